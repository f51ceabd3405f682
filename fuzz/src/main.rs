//! One target of `targets.rs`, run by libFuzzer. The environment says which: `RAIDTAPE_FUZZ=frame`.

#![no_main]

mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<targets::Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("RAIDTAPE_FUZZ").unwrap_or_default();
        let found = targets::TARGETS.iter().find(|it| it.0 == name);
        let Some((_, target)) = found else {
            let names: Vec<&str> = targets::TARGETS.iter().map(|it| it.0).collect();
            panic!("RAIDTAPE_FUZZ is {name:?}, and must be one of: {}", names.join(" "));
        };
        TARGET.get_or_init(|| *target);
    },
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            target(data);
        }
    }
);
