//! The program `kmcl`: arguments, then a configuration, then `run`, then an exit code.
fn main() {}
