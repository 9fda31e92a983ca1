//! One suite, every back end.

mod cancel;
mod harness;
mod images;
mod limits;
mod suite;
