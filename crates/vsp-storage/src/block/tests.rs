//! One suite, every back end.

mod harness;
mod images;
mod limits;
mod suite;
