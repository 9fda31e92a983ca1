//! The shared library bears the name under which programs will look for it.

fn main() {
    // Before 1.0 every minor version may change the binary interface.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkmcl.so.0.1");
    println!("cargo:rerun-if-changed=build.rs");
}
