//! D: what the health check asks `tart`, and how its answers are read. It changes nothing and needs no VM.

use super::says;
use crate::doctor::facts::{Fact, Listed};

pub const PROGRAM: &str = "tart";
pub const VERSION: &[&str] = &["--version"];
pub const LIST: &[&str] = &["list", "--format", "json"];
/// What makes it answer for a machine and change nothing by itself.
pub const VARIABLES: [(&str, &str); 2] = [("CI", "1"), ("TART_NO_AUTO_PRUNE", "1")];

/// Reads its list.
pub fn parse_list(text: &str) -> Fact<Vec<Listed>> {
    let listed = says::parse_list(text)?.into_iter();
    Ok(listed.map(|vm| Listed { running: vm.is_running(), image: vm.is_image(), name: vm.name }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_all_versions_are_read() {
        let new = r#"[ { "State" : "running", "Name" : "job-5f0c", "Size" : 31, "Source" : "local", "Running" : true },
            { "Name" : "registry\/mac:latest", "Source" : "OCI", "Running" : false, "State" : "stopped", "Extra" : [] } ]"#;
        let job = Listed { name: "job-5f0c".into(), image: false, running: true };
        let image = Listed { name: "registry/mac:latest".into(), image: true, running: false };
        assert_eq!(parse_list(new), Ok(vec![job.clone(), image]));
        let old = r#"[{"Name": "job-5f0c", "Source": "local", "State": "running", "SizeOnDisk": 3}]"#;
        assert_eq!(parse_list(old), Ok(vec![job]));
        assert_eq!(parse_list("[]"), Ok(vec![]));
        assert!(parse_list("Error: no").unwrap_err().contains("cannot be read"));
    }
}
