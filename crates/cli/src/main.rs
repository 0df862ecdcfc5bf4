//! The `overspill` command line.
fn main() {}
