//! What every target of this folder is: a function of `saved_state_tests::targets`, and a mutator that
//! puts checksums right.

pub use libfuzzer_sys;
pub use saved_state_tests::targets::{TARGETS, Target};

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> &'static Target {
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("no target {name}"))
}

/// Has libFuzzer run a target, by name.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        static TARGET: std::sync::LazyLock<&$crate::Target> =
            std::sync::LazyLock::new(|| $crate::target($name));

        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| (TARGET.run)(data));

        $crate::libfuzzer_sys::fuzz_mutator!(|data: &mut [u8],
                                              size: usize,
                                              max_size: usize,
                                              seed: u32| {
            let room = data.len().min(max_size);
            let raw: &mut dyn FnMut(&mut [u8], usize, usize) -> usize =
                &mut |bytes, used, most| $crate::libfuzzer_sys::fuzzer_mutate(bytes, used, most);
            (TARGET.mutate)(&mut data[..room], size, seed, raw)
        });
    };
}
