use clap::Parser as _;

use super::*;
use crate::{Cli, commands::Command};
use alloy_shared::wire::network::Network;

fn parse(line: &[&str]) -> RunArgs {
    match Cli::try_parse_from([&["alloy", "run"], line].concat()).unwrap().command {
        Command::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn arguments_become_a_spec() {
    let args = parse(&[
        "-c",
        "make",
        "--env",
        "A=1=2",
        "--env",
        "HERE",
        "--artifact",
        "*.ipa",
        "--artifact",
        "=out/**",
        "--timeout",
        "10m",
        "--label",
        "chip=m4",
        "--retries",
        "2",
        "--image",
        "img",
        "--network",
        "allow=10.0.0.0/8,1.1.1.1/32",
        "--queue-timeout",
        "1h30m",
    ]);
    let var = |name: &str| (name == "HERE").then(|| "from here".to_owned());
    let spec = spec(&args, &var).unwrap();
    assert_eq!(spec.shell.as_deref(), Some("make"));
    assert_eq!(spec.env, BTreeMap::from([("A".into(), "1=2".into()), ("HERE".into(), "from here".into())]));
    assert_eq!(spec.artifacts, ["*.ipa", "=out/**"]);
    assert_eq!(spec.network, Network::Allow(vec!["10.0.0.0/8".into(), "1.1.1.1/32".into()]));
    assert_eq!(spec.labels, BTreeMap::from([("chip".into(), "m4".into())]));
    assert_eq!((spec.timeout_ms, spec.queue_timeout_ms, spec.retries), (Some(600_000), Some(5_400_000), 2));

    let args = parse(&["--", "xcodebuild", "-scheme", "MyApp", "--json"]);
    assert_eq!(super::spec(&args, &var).unwrap().argv, ["xcodebuild", "-scheme", "MyApp", "--json"]);
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for line in [
        &["alloy", "run"][..],
        &["alloy", "run", "-c", "x", "--", "y"],
        &["alloy", "run", "-c", "x", "--timeout", "soon"],
        &["alloy", "run", "-c", "x", "--retries", "11"],
        &["alloy", "run", "-c", "x", "--network", "off"],
        &["alloy", "run", "-c", "x", "--local", "--url", "http://x"],
    ] {
        assert!(Cli::try_parse_from(line).is_err(), "{line:?}");
    }
    for line in [
        &["-c", "x", "--env", "GONE"][..],
        &["-c", "x", "--env", "=1"],
        &["-c", "x", "--label", "chip"],
        &["-c", " "],
        &["-c", "x", "--env", "1A=x"],
        &["-c", "x", "--env", "ALLOY_URL=x"],
        &["-c", "x", "--artifact", "../out"],
        &["-c", "x", "--image", "a b"],
        &["-c", "x", "--network", "allow=10.1.2.3"],
    ] {
        assert_eq!(spec(&parse(line), &|_| None).unwrap_err().fault, Fault::Usage, "{line:?}");
    }
    let failure = spec(&parse(&["-c", "x", "--env", "=hush"]), &|_| None).unwrap_err();
    assert!(!failure.message.contains("hush"), "{failure:?}");
}

#[test]
fn times_are_written_with_units() {
    for (text, ms) in [("90s", 90_000), ("10m", 600_000), ("1h30m", 5_400_000), ("250ms", 250), ("1d", 86_400_000)] {
        assert_eq!(milliseconds(text), Ok(ms), "{text}");
    }
    for text in ["", "90", "s", "1x", "-1s", "0s", "1.5h", "99999999999999999999s", "9999999999999999d"] {
        assert!(milliseconds(text).is_err(), "{text}");
    }
    // Some defaults are the farm's, others are `for ever`.
    assert!(!milliseconds("0s").unwrap_err().contains("farm"));
}
