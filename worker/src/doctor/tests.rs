use std::collections::BTreeSet;
use std::path::PathBuf;

use super::facts::*;
use super::*;
use crate::config::Provider;

const GB: u64 = 1_000_000_000;

/// A Mac as it should be.
fn good_mac() -> Facts {
    let power = [("sleep", 0), ("disksleep", 0), ("displaysleep", 0), ("autorestart", 1)];
    Facts {
        system: System::Macos,
        provider: Provider::Tart,
        slots: 2,
        image: "registry/macos-tahoe-xcode:26".into(),
        user: "farm".into(),
        state_dir: "/s".into(),
        identity: Identity::Joined { name: "mini".into(), url: "https://farm".into() },
        files: vec![FileMode { path: "/s/worker.key".into(), mode: 0o600, ours: true }],
        disks: vec![Ok(Disk { path: "/s".into(), free: 900 * GB, images: true })],
        farm: Some(Farm { url: "https://farm".into(), seen: Ok(FarmSeen { skew_ms: Some(12), took_ms: 3 }) }),
        clock_kept: Ok(true),
        tart: Some(Tart { path: "/b/tart".into(), version: Ok("2.35.0".into()), listed: Ok(vec![]) }),
        softnet: Some(Softnet { path: "/b/softnet".into(), set_uid: true, by_sudo: false }),
        service: Ok(Service::Running),
        open_files: Ok(65_536),
        mac: Some(Mac {
            version: Ok((15, 6)),
            arch: "arm64".into(),
            root: false,
            gui_session: Ok(true),
            keychain: Ok(Keychain::Open),
            power: Ok(power.map(|(name, value)| (name.to_owned(), value)).into()),
            app_nap_off: Ok(true),
            auto_login: Ok(Some("farm".into())),
            file_vault: Ok(false),
            updates_automatic: Ok(false),
            dhcp_lease_s: Ok(Some(600)),
            dhcp_live: Ok(3),
            vm_processes: Ok(0),
        }),
    }
}

fn mac(change: impl FnOnce(&mut Mac)) -> Facts {
    let mut facts = good_mac();
    change(facts.mac.as_mut().unwrap());
    facts
}

fn with(change: impl FnOnce(&mut Facts)) -> Facts {
    let mut facts = good_mac();
    change(&mut facts);
    facts
}

/// What is not right, as code and severity.
fn wrong(report: &Report) -> Vec<(Code, Severity)> {
    report.findings.iter().filter(|finding| finding.severity > Severity::Note).map(|f| (f.code, f.severity)).collect()
}

#[test]
fn a_mac_as_it_should_be_has_every_check_and_no_fault() {
    let report = examine(&good_mac());
    assert_eq!(wrong(&report), []);
    assert_eq!(report.not_checked, []);
    let seen: BTreeSet<Code> = report.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(seen, Code::ALL.into_iter().collect(), "a check is missing");
}

#[test]
fn each_fault_is_found_alone_and_has_a_fix() {
    use Severity::{Error, Warning};
    let version = |text: &'static str| with(move |f| f.tart.as_mut().unwrap().version = Ok(text.into()));
    let power = |name: &'static str, value| mac(move |m| _ = m.power.as_mut().unwrap().insert(name.into(), value));
    let skewed = with(|f| f.farm.as_mut().unwrap().seen.as_mut().unwrap().skew_ms = Some(31_000));
    let free = |gb| with(move |f| f.disks[0].as_mut().unwrap().free = gb * GB);
    let listed = |name: &str| Listed { name: name.into(), image: false, running: true };
    let cases: Vec<(&str, Facts, Code, Severity)> = vec![
        ("linux", with(|f| f.system = System::Linux), Code::Provider, Error),
        ("not joined", with(|f| f.identity = Identity::Missing), Code::Identity, Error),
        ("damaged", with(|f| f.identity = Identity::Damaged("x".into())), Code::Identity, Error),
        ("open key", with(|f| f.files[0].mode = 0o644), Code::FileModes, Error),
        ("another's key", with(|f| f.files[0].ours = false), Code::FileModes, Error),
        ("no farm", with(|f| f.farm.as_mut().unwrap().seen = Err("refused".into())), Code::Orchestrator, Error),
        ("skew", skewed, Code::Clock, Error),
        ("no time service", with(|f| f.clock_kept = Ok(false)), Code::Clock, Warning),
        ("full disk", free(0), Code::Disk, Error),
        ("small disk", free(150), Code::Disk, Warning),
        ("no tart", with(|f| f.tart = None), Code::TartVersion, Error),
        ("old tart", version("2.26.9"), Code::TartVersion, Error),
        ("bad tart", version("2.32.1"), Code::TartVersion, Warning),
        ("older tart", version("2.33.0"), Code::TartVersion, Warning),
        ("no softnet", with(|f| f.softnet = None), Code::Softnet, Error),
        ("softnet, no right", with(|f| f.softnet.as_mut().unwrap().set_uid = false), Code::Softnet, Error),
        ("foreign", with(|f| f.tart.as_mut().unwrap().listed = Ok(vec![listed("win")])), Code::ForeignVms, Warning),
        (
            "foreign, named like ours",
            with(|f| f.tart.as_mut().unwrap().listed = Ok(vec![listed("alloy-macos-xcode")])),
            Code::ForeignVms,
            Warning,
        ),
        ("foreign, unlisted", mac(|m| m.vm_processes = Ok(1)), Code::ForeignVms, Warning),
        ("stopped", with(|f| f.service = Ok(Service::Stopped)), Code::Service, Warning),
        ("until logout", with(|f| f.service = Ok(Service::RunningUntilLogout)), Code::Service, Warning),
        ("few files", with(|f| f.open_files = Ok(256)), Code::Limits, Warning),
        ("old macOS", mac(|m| m.version = Ok((13, 6))), Code::System, Error),
        ("Intel", mac(|m| m.arch = "x86_64".into()), Code::System, Error),
        ("root", mac(|m| m.root = true), Code::User, Error),
        ("nobody logged in", mac(|m| m.gui_session = Ok(false)), Code::LoginSession, Error),
        ("locked", mac(|m| m.keychain = Ok(Keychain::Locked)), Code::Keychain, Error),
        ("no keychain", mac(|m| m.keychain = Ok(Keychain::Missing)), Code::Keychain, Error),
        ("locks itself", mac(|m| m.keychain = Ok(Keychain::LocksItself)), Code::KeychainLock, Warning),
        ("no auto-login", mac(|m| m.auto_login = Ok(None)), Code::AutoLogin, Warning),
        ("other's login", mac(|m| m.auto_login = Ok(Some("ann".into()))), Code::AutoLogin, Warning),
        ("FileVault", mac(|m| m.file_vault = Ok(true)), Code::FileVault, Warning),
        ("sleep", power("sleep", 10), Code::Sleep, Error),
        ("display sleep", power("displaysleep", 10), Code::Sleep, Warning),
        ("stays off", power("autorestart", 0), Code::PowerFailure, Warning),
        ("App Nap", mac(|m| m.app_nap_off = Ok(false)), Code::AppNap, Warning),
        ("updates", mac(|m| m.updates_automatic = Ok(true)), Code::Updates, Warning),
        ("lease", mac(|m| m.dhcp_lease_s = Ok(None)), Code::DhcpLease, Warning),
        ("pool", mac(|m| m.dhcp_live = Ok(240)), Code::DhcpPool, Error),
    ];
    for (name, facts, code, severity) in cases {
        let report = examine(&facts);
        assert_eq!(wrong(&report), [(code, severity)], "{name}: {report:#?}");
        let fix = report.findings.iter().find(|finding| finding.severity > Severity::Note).unwrap().fix.as_ref();
        let fix = fix.unwrap_or_else(|| panic!("{name} has no fix"));
        assert!(!fix.text.is_empty() || !fix.commands.is_empty(), "{name}");
        assert!(fix.commands.iter().all(|argv| !argv.is_empty()), "{name}");
    }
}

#[test]
fn what_lowers_a_protection_is_never_done_by_itself() {
    let mut facts = mac(|mac| {
        mac.keychain = Ok(Keychain::LocksItself);
        mac.auto_login = Ok(None);
        mac.file_vault = Ok(true);
    });
    facts.softnet.as_mut().unwrap().set_uid = false;
    facts.files[0].ours = false;
    let report = examine(&facts);
    let kept =
        [Code::KeychainLock, Code::AutoLogin, Code::FileVault, Code::Softnet, Code::FileModes, Code::LocalNetwork];
    for code in kept {
        let finding = report.findings.iter().find(|finding| finding.code == code && finding.severity > Severity::Ok);
        let finding = finding.unwrap_or_else(|| panic!("{code}"));
        assert!(!finding.fix.as_ref().unwrap().automatic, "{code}");
    }
}

#[test]
fn what_is_not_known_is_said_and_never_called_fine() {
    let why = || "no answer".to_owned();
    let mut facts = mac(|mac| {
        *mac = Mac {
            version: Err(why()),
            arch: "arm64".into(),
            root: false,
            gui_session: Err(why()),
            keychain: Err(why()),
            power: Err(why()),
            app_nap_off: Err(why()),
            auto_login: Err(why()),
            file_vault: Err(why()),
            updates_automatic: Err(why()),
            dhcp_lease_s: Err(why()),
            dhcp_live: Err(why()),
            vm_processes: Err(why()),
        }
    });
    facts.disks = vec![Err(why())];
    facts.clock_kept = Err(why());
    facts.service = Err(why());
    facts.open_files = Err(why());
    facts.farm = None;
    let tart = facts.tart.as_mut().unwrap();
    (tart.version, tart.listed) = (Err(why()), Err(why()));
    let report = examine(&facts);
    let fine: Vec<Code> = report.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(fine, [Code::Provider, Code::Identity, Code::FileModes, Code::Softnet, Code::User]);
    let missing: BTreeSet<Code> = report.not_checked.iter().map(|missing| missing.code).collect();
    assert_eq!(missing.len() + fine.len(), Code::ALL.len());
}

#[test]
fn elsewhere_it_says_what_it_did_not_look_at() {
    let facts = with(|facts| {
        (facts.system, facts.provider, facts.mac) = (System::Linux, Provider::Host, None);
        (facts.tart, facts.softnet) = (None, None);
    });
    let report = examine(&facts);
    assert_eq!(wrong(&report), []);
    let seen: BTreeSet<Code> = report.findings.iter().map(|finding| finding.code).collect();
    let missing: BTreeSet<Code> = report.not_checked.iter().map(|missing| missing.code).collect();
    assert!(seen.is_disjoint(&missing), "{seen:?} {missing:?}");
    assert_eq!(seen.union(&missing).count(), Code::ALL.len());
}

#[test]
fn our_own_vms_are_no_strangers_and_a_pulled_image_needs_no_room() {
    let mut facts = mac(|mac| mac.vm_processes = Ok(2));
    let name = |name: &str, image, running| Listed { name: name.into(), image, running };
    facts.tart.as_mut().unwrap().listed = Ok(vec![
        name("alloy-00000001-1", false, true),
        name("alloy-00000001-2", false, true),
        name("golden", false, false),
    ]);
    facts.disks[0].as_mut().unwrap().free = 100 * GB;
    assert_eq!(wrong(&examine(&facts)), [(Code::Disk, Severity::Warning)]);
    facts.tart.as_mut().unwrap().listed.as_mut().unwrap().push(name("registry/macos-tahoe-xcode:26", true, false));
    assert_eq!(wrong(&examine(&facts)), []);
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let facts = with(|facts| {
        facts.farm.as_mut().unwrap().seen = Err("\u{1b}[2J".into());
        facts.tart.as_mut().unwrap().listed =
            Ok(vec![Listed { name: "\u{1b}]0;x\u{7}".into(), image: false, running: true }]);
    });
    let report = examine(&facts);
    let all = format!("{:?}", report.findings.iter().map(|finding| &finding.text).collect::<Vec<_>>());
    assert!(!all.contains("\\u{1b}") && !all.contains("\\u{7}"), "{all}");
}

#[test]
fn answers_of_programs_are_read() {
    let power = "System-wide power settings:\nCurrently in use:\n standby              0\n sleep                10 (sleep prevented by sharingd)\n autorestart          1\n displaysleep         0\n";
    let power = parse_power(power);
    assert_eq!((power.get("sleep"), power.get("autorestart"), power.get("System-wide")), (Some(&10), Some(&1), None));
    assert_eq!(parse_file_vault("FileVault is On.\n"), Ok(true));
    assert_eq!(parse_file_vault("FileVault is Off.\nDeferred enablement…"), Ok(false));
    assert!(parse_file_vault("Error: -1\n").unwrap_err().contains("Error: -1"));
    for (status, text, want) in [
        (Some(0), "Keychain \"<NULL>\" no-timeout\n", Keychain::Open),
        (Some(0), "Keychain \"<NULL>\" lock-on-sleep timeout=300s\n", Keychain::LocksItself),
        (Some(36), "security: SecKeychainCopySettings x: User interaction is not allowed.\n", Keychain::Locked),
        (
            Some(50),
            "security: SecKeychainCopySettings x: The specified keychain could not be found.\n",
            Keychain::Missing,
        ),
        (None, "", Keychain::Locked),
    ] {
        assert_eq!(parse_keychain(status, text), Ok(want), "{text}");
    }
    assert!(parse_keychain(Some(1), "weird").is_err());
    let leases =
        "{\n\tname=a\n\tip_address=192.168.64.7\n\tlease=0x68a2f1c4\n}\n{\n\tlease=0x10\n}\n{\n\tlease=0xffffffff\n}\n";
    assert_eq!(count_leases(leases, 0x68a2_f1c4), 1);
    assert_eq!(count_leases(leases, 0x68a2_f1c3), 2);
    let processes = "/sbin/launchd\n/System/Library/Frameworks/Virtualization.framework/Versions/A/XPCServices/com.apple.Virtualization.VirtualMachine.xpc/Contents/MacOS/com.apple.Virtualization.VirtualMachine\n/usr/bin/ssh\n";
    assert_eq!(count_vm_processes(processes), 1);
    for (text, want) in [("2.35.0\n", Some((2, 35))), ("15", Some((15, 0))), ("SNAPSHOT", None), ("2.x", None)] {
        assert_eq!(parse_version(text), want, "{text}");
    }
    for (image, gb) in [("r/macos-tahoe-base", 50), ("r/ubuntu:latest", 20), ("macos-runner:tahoe", 350), ("own", 140)]
    {
        assert_eq!(image_bytes(image), gb * GB, "{image}");
    }
    assert_eq!(System::parse("macos"), System::Macos);
    assert_eq!(PathBuf::from("/s"), good_mac().state_dir);
}

#[test]
fn a_code_is_one_word_and_the_same_in_json() {
    for code in Code::ALL {
        assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
    }
}

#[test]
fn why_an_orchestrator_is_not_reached_is_told_to_its_end() {
    let why = "cannot reach the farm at http://a-long-name.example.com:3000: tcp connect error: Connection refused (os error 111)";
    let facts = with(|facts| facts.farm = Some(Farm { url: "http://farm".into(), seen: Err(why.into()) }));
    let found = examine(&facts).findings.into_iter().find(|finding| finding.code == Code::Orchestrator).unwrap();
    assert_eq!(found.text, why);
}
