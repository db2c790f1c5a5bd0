//! Where another system links for macOS, the names in Apple's frameworks come from the stubs in `macos/`; a Mac uses its own SDK.
use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let for_mac = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "macos");
    let on_mac = env::var("HOST").is_ok_and(|host| host.contains("apple"));
    if for_mac && !on_mac {
        println!("cargo::rustc-link-search=framework={}/macos", env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    }
}
