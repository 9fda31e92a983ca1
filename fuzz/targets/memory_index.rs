//! See `saved_state_tests::targets`.
#![no_main]

kmcl_fuzz::target!("memory_index");
