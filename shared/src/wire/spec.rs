//! D: which specs make sense anywhere: one rule for the farm, which refuses, and for senders, who ask before they send a tree.
//! Every fault is found at once and named by its field.

use super::FieldError;
use super::job::{JobSpec, required_labels};
use super::network::{Network, check_range};
use super::rule::ArtifactRule;
use crate::id::{BadName, Labels, printable};
use crate::limits;

/// Faults beyond are not told.
pub const FAULTS_MAX: usize = 50;

/// Checks a spec and returns the labels that it requires. What a farm's own limits say is checked there.
pub fn check(spec: &JobSpec) -> Result<Labels, Vec<FieldError>> {
    let mut faults = Faults(Vec::new());
    command(spec, &mut faults);
    environment(spec, &mut faults);
    artifacts(spec, &mut faults);
    durations(spec, &mut faults);
    if let Some(image) = &spec.image {
        faults.check("image", check_image(image));
    }
    network(&spec.network, &mut faults);
    if spec.retries > limits::RETRIES_MAX {
        faults.add("retries", format!("is {}, at most {} are allowed", spec.retries, limits::RETRIES_MAX));
    }
    if let Some(git) = &spec.git {
        let long = |text: &str| text.len() > 1024 || text.contains(char::is_control);
        if long(&git.commit) || git.branch.as_deref().is_some_and(long) {
            faults.add("git", "holds more than 1024 bytes, or control characters");
        }
    }
    let labels = labels(spec, &mut faults);
    if faults.0.is_empty() { Ok(labels) } else { Err(faults.0) }
}

struct Faults(Vec<FieldError>);

impl Faults {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        // A hostile spec could have a hundred thousand; the first ones are enough to act on.
        if self.0.len() < FAULTS_MAX {
            self.0.push(FieldError { field: field.into(), message: message.into() });
        }
    }
    fn check(&mut self, field: impl Into<String>, result: Result<(), String>) {
        if let Err(message) = result {
            self.add(field, message);
        }
    }
}

fn command(spec: &JobSpec, faults: &mut Faults) {
    match (&spec.shell, spec.argv.as_slice()) {
        (Some(_), [_, ..]) => faults.add("argv", "stands beside `shell`; a job has exactly one of the two"),
        (None, []) => faults.add("shell", "is missing; a job needs `shell` or `argv`"),
        (Some(line), []) => {
            if line.trim().is_empty() {
                faults.add("shell", "is empty");
            }
            text("shell", line, limits::COMMAND_MAX, faults);
        }
        (None, argv @ [program, ..]) => {
            if program.is_empty() {
                faults.add("argv[0]", "is empty; it names the program");
            }
            if argv.len() > limits::ARGV_MAX {
                faults.add("argv", format!("has {} words, at most {} are allowed", argv.len(), limits::ARGV_MAX));
            }
            let mut left = limits::COMMAND_MAX;
            for (i, word) in argv.iter().enumerate() {
                text(&format!("argv[{i}]"), word, left, faults);
                left = left.saturating_sub(word.len());
            }
        }
    }
}

fn text(field: &str, value: &str, max: usize, faults: &mut Faults) {
    if value.len() > max {
        faults.add(field, format!("has {} bytes, {max} are left of the allowed ones", value.len()));
    }
    if value.contains('\0') {
        faults.add(field, "holds a NUL");
    }
}

fn environment(spec: &JobSpec, faults: &mut Faults) {
    if spec.env.len() > limits::ENV_COUNT_MAX {
        faults.add("env", format!("has {} variables, at most {} are allowed", spec.env.len(), limits::ENV_COUNT_MAX));
    }
    let mut bytes = 0;
    for (name, value) in &spec.env {
        // Values may be secret: only the name is ever repeated.
        let field = format!("env.{}", printable(name));
        if !is_env_name(name) {
            faults.add(&field, "is no name of a variable: letters, digits and _, not starting with a digit");
        } else if name.starts_with("ALLOY_") {
            faults.add(&field, "names starting with ALLOY_ are set by the farm");
        }
        if value.contains('\0') {
            faults.add(&field, "its value holds a NUL");
        }
        bytes += name.len() + value.len();
    }
    if bytes > limits::ENV_BYTES_MAX {
        faults.add("env", format!("has {bytes} bytes, at most {} are allowed", limits::ENV_BYTES_MAX));
    }
}

fn is_env_name(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
}

fn artifacts(spec: &JobSpec, faults: &mut Faults) {
    if spec.artifacts.len() > limits::ARTIFACT_RULES_MAX {
        let (have, max) = (spec.artifacts.len(), limits::ARTIFACT_RULES_MAX);
        faults.add("artifacts", format!("has {have} rules, at most {max} are allowed"));
    }
    for (i, rule) in spec.artifacts.iter().enumerate().take(limits::ARTIFACT_RULES_MAX) {
        faults.check(format!("artifacts[{i}]"), ArtifactRule::parse(rule).map(drop));
    }
}

fn durations(spec: &JobSpec, faults: &mut Faults) {
    for (field, value) in [("timeout_ms", spec.timeout_ms), ("queue_timeout_ms", spec.queue_timeout_ms)] {
        if value == Some(0) {
            faults.add(field, "is 0; leave it out for the farm's default");
        }
    }
}

/// `[registry/]name[/name…][:tag][@sha256:hex]`. It becomes a word on a command line of the worker's, so it never
/// starts with a dash and holds nothing that a shell or an option parser could read.
pub fn check_image(name: &str) -> Result<(), String> {
    let fail = |why: &str| Err(format!("`{}` {why}", printable(name)));
    if name.is_empty() || name.len() > 255 {
        return fail("is not 1 to 255 characters long");
    }
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (name, None),
    };
    if let Some(digest) = digest {
        let hex = digest.strip_prefix("sha256:").unwrap_or("");
        if hex.len() != 64 || !hex.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return fail("has a digest that is not sha256: and 64 hex digits");
        }
    }
    for part in rest.split('/') {
        let fine = part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-' | b':'));
        if !fine {
            return fail("is no image name, such as ghcr.io/cirruslabs/macos-sonoma-xcode:latest");
        }
    }
    Ok(())
}

fn labels(spec: &JobSpec, faults: &mut Faults) -> Labels {
    let mut labels = Labels::default();
    let before = faults.0.len();
    for (key, value) in &spec.labels {
        if let Err(BadName { what, why }) = labels.insert(key, value) {
            faults.add(format!("labels.{}", printable(key)), format!("{what} {why}"));
        }
    }
    match required_labels(spec) {
        Ok(required) => required,
        Err(BadName { what, why }) => {
            if faults.0.len() == before {
                faults.add("labels", format!("{what} {why}; a network policy takes one"));
            }
            labels
        }
    }
}

fn network(network: &Network, faults: &mut Faults) {
    let Network::Allow(ranges) = network else { return };
    if ranges.is_empty() {
        faults.add("network.allow", "is empty; `none` is the policy that lets nobody through");
    }
    if ranges.len() > limits::NETWORK_RANGES_MAX {
        let (have, max) = (ranges.len(), limits::NETWORK_RANGES_MAX);
        faults.add("network.allow", format!("has {have} ranges, at most {max} are allowed"));
    }
    for (i, range) in ranges.iter().enumerate().take(limits::NETWORK_RANGES_MAX) {
        faults.check(format!("network.allow[{i}]"), check_range(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(spec: serde_json::Value) -> Vec<String> {
        let spec: JobSpec = serde_json::from_value(spec).unwrap();
        match check(&spec) {
            Ok(_) => vec![],
            Err(faults) => faults.into_iter().map(|fault| fault.field).collect(),
        }
    }

    #[test]
    fn good_specs_pass() {
        for spec in [
            serde_json::json!({"shell": "make -j2"}),
            serde_json::json!({"shell": "x", "network": "none"}),
            serde_json::json!({"shell": "x", "network": {"allow": ["10.0.0.0/8", "192.168.7.1/32"]}}),
            serde_json::json!({"argv": ["xcodebuild", "test", "-scheme", "My App"]}),
            serde_json::json!({"shell": "x", "env": {"A_1": "", "_": "é"}, "labels": {"xcode": "16.4"}, "retries": 10,
                "artifacts": ["=build//*.app", "!**/*.tmp", "./out/./x/"], "timeout_ms": 1, "image": "ghcr.io/cirruslabs/macos-sonoma-xcode:latest"}),
        ] {
            assert_eq!(faults(spec.clone()), Vec::<String>::new(), "{spec}");
        }
    }

    #[test]
    fn every_fault_is_named_by_its_field() {
        let long = "x".repeat(limits::COMMAND_MAX + 1);
        let (nested, deep) = ("{{{{{{{{{{a/".repeat(30) + "a" + &"}}}}}}}}}}/".repeat(30), "d/".repeat(65));
        let many = [&["x"; limits::ARTIFACT_RULES_MAX][..], &["["]].concat();
        for (spec, fields) in [
            (serde_json::json!({}), vec!["shell"]),
            (serde_json::json!({"shell": " "}), vec!["shell"]),
            (serde_json::json!({"shell": "a", "argv": ["b"]}), vec!["argv"]),
            (serde_json::json!({"argv": ["", "a\u{0}"]}), vec!["argv[0]", "argv[1]"]),
            (serde_json::json!({"shell": long}), vec!["shell"]),
            (
                serde_json::json!({"shell": "a", "env": {"1A": "", "A-B": "", "ALLOY_URL": "", "": ""}}),
                vec!["env.", "env.1A", "env.A-B", "env.ALLOY_URL"],
            ),
            (
                serde_json::json!({"shell": "a", "artifacts": ["", "/etc/*", "a/../../b", "a[", "=", "ok/*"]}),
                vec!["artifacts[0]", "artifacts[1]", "artifacts[2]", "artifacts[3]", "artifacts[4]"],
            ),
            (
                serde_json::json!({"shell": "a", "artifacts": ["ok", nested, deep]}),
                vec!["artifacts[1]", "artifacts[2]"],
            ),
            (serde_json::json!({"shell": "a", "artifacts": many}), vec!["artifacts"]),
            (serde_json::json!({"shell": "a", "labels": {"a b": "c", "x": ""}}), vec!["labels.a b", "labels.x"]),
            (
                serde_json::json!({"shell": "a", "timeout_ms": 0, "queue_timeout_ms": 0, "retries": 11}),
                vec!["timeout_ms", "queue_timeout_ms", "retries"],
            ),
            (serde_json::json!({"shell": "a", "network": {"allow": []}}), vec!["network.allow"]),
            (
                serde_json::json!({"shell": "a", "network": {"allow": ["10.0.0.0/8", "10.0.0.1/8", "x"]}}),
                vec!["network.allow[1]", "network.allow[2]"],
            ),
            (serde_json::json!({"shell": "a", "network": {"allow": vec!["10.0.0.0/8"; 65]}}), vec!["network.allow"]),
            (
                serde_json::json!({"shell": "a", "network": "none", "labels":
                    (0..32).map(|n| (format!("l{n}"), "x".to_owned())).collect::<std::collections::BTreeMap<_, _>>()}),
                vec!["labels"],
            ),
            (serde_json::json!({"shell": "a", "image": "--help"}), vec!["image"]),
            (serde_json::json!({"shell": "a", "image": "a b"}), vec!["image"]),
            (serde_json::json!({"shell": "a", "image": "a@sha256:12"}), vec!["image"]),
        ] {
            let mut expected: Vec<String> = fields.into_iter().map(str::to_owned).collect();
            let mut found = faults(spec.clone());
            expected.sort();
            found.sort();
            assert_eq!(found, expected, "{spec}");
        }
    }

    #[test]
    fn a_policy_of_its_own_needs_a_worker_that_can_restrict_it() {
        let required = |network: Network| {
            let spec = JobSpec { shell: Some("x".into()), network, ..JobSpec::default() };
            check(&spec).unwrap().iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(required(Network::Default), Vec::<String>::new());
        assert_eq!(required(Network::None), ["network-policy=per-job"]);
        assert_eq!(required(Network::Allow(vec!["10.0.0.0/8".into()])), ["network-policy=per-job"]);
    }

    #[test]
    fn a_secret_value_is_not_repeated() {
        let spec: JobSpec =
            serde_json::from_value(serde_json::json!({"shell": "a", "env": {"TOKEN": "hunter2\u{0}"}})).unwrap();
        let faults = check(&spec).unwrap_err();
        assert!(!format!("{faults:?}").contains("hunter2"), "{faults:?}");
    }
}
