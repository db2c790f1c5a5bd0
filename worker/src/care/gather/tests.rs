use std::os::unix::fs::PermissionsExt as _;

use alloy_shared::runtime::SystemEnv;
use plist::Dictionary;
use tempfile::TempDir;

use super::*;
use crate::doctor::facts::{Keychain, Listed};
use crate::doctor::{Code, Severity, examine};

/// A Mac in a directory: programs that answer like its own, and its preferences.
struct Stage {
    dir: TempDir,
    world: World,
    config: Config,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["bin", "root", "home", "state"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let world = World {
            system: System::Macos,
            // The stand-ins are shell scripts.
            path: format!("{}:/bin:/usr/bin", at("bin").display()).into(),
            root: at("root"),
            home: at("home"),
            user: "farm".into(),
            uid: nix::unistd::getuid().as_raw(),
            arch: "arm64".into(),
            service: "alloy-worker".into(),
            tart_home: None,
        };
        let config = Config { url: None, provider: Provider::Tart, ..Config::embedded(String::new(), at("state")) };
        Self { dir, world, config }
    }

    /// A program: what it does with its arguments as `$*`.
    fn program(&self, name: &str, script: &str) {
        let path = self.dir.path().join("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn preference(&self, path: &Path, key: &str, value: Value) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let list: Dictionary = [(key.to_owned(), value)].into_iter().collect();
        // As the system writes them.
        Value::Dictionary(list).to_file_binary(path).unwrap();
    }

    async fn facts(&self) -> Facts {
        gather(&self.world, &self.config, Arc::new(SystemEnv::detached())).await
    }
}

#[tokio::test]
async fn a_mac_is_looked_at_through_its_own_programs_and_files() {
    let stage = Stage::new();
    stage.program("sw_vers", "echo 15.6.1");
    stage.program(
        "launchctl",
        "case \"$*\" in *alloy-worker) echo 'state = running';; 'print gui/'*) ;; *) exit 1;; esac",
    );
    stage.program("security", "test \"$1\" = show-keychain-info && echo 'Keychain \"<NULL>\" no-timeout' >&2");
    stage.program("pmset", "echo ' sleep 0 (prevented)'; echo ' displaysleep 5'; echo ' autorestart 0'");
    stage.program("fdesetup", "echo 'FileVault is On.'");
    stage.program("ps", "echo /x/com.apple.Virtualization.VirtualMachine; echo /sbin/launchd");
    stage.program("softnet", "exit 1");
    stage.program("sudo", "test \"$1\" = -n");
    let list = r#"[{"Name":"alloy-00000001-1","Source":"local","Running":true}]"#;
    stage.program("tart", &format!("case \"$*\" in --version) echo 2.35.0;; *) echo '{list}';; esac"));
    let settings = |name: &str| stage.dir.path().join(format!("root/Library/Preferences/{name}.plist"));
    let lease: Dictionary = [("DHCPLeaseTimeSecs".to_owned(), Value::Integer(600.into()))].into_iter().collect();
    let sharing = settings("SystemConfiguration/com.apple.InternetSharing.default");
    stage.preference(&sharing, "bootpd", Value::Dictionary(lease));
    stage.preference(&settings("com.apple.loginwindow"), "autoLoginUser", Value::String("farm".into()));
    stage.preference(&settings("com.apple.SoftwareUpdate"), "AutomaticallyInstallMacOSUpdates", Value::Boolean(true));
    let global = stage.dir.path().join("home/Library/Preferences/.GlobalPreferences.plist");
    stage.preference(&global, "NSAppSleepDisabled", Value::Integer(1.into()));
    let leases = stage.dir.path().join("root/var/db/dhcpd_leases");
    std::fs::create_dir_all(leases.parent().unwrap()).unwrap();
    std::fs::write(&leases, "{\n\tlease=0xfffffffff\n}\n").unwrap();

    let facts = stage.facts().await;
    let mac = facts.mac.clone().unwrap();
    assert_eq!((mac.version, mac.gui_session, mac.keychain), (Ok((15, 6)), Ok(true), Ok(Keychain::Open)));
    assert_eq!(mac.power.unwrap().get("displaysleep"), Some(&5));
    assert_eq!((mac.file_vault, mac.updates_automatic, mac.app_nap_off), (Ok(true), Ok(true), Ok(true)));
    assert_eq!((mac.auto_login, mac.dhcp_lease_s, mac.dhcp_live), (Ok(Some("farm".into())), Ok(Some(600)), Ok(1)));
    assert_eq!((mac.vm_processes, facts.service.clone()), (Ok(1), Ok(Service::Running)));
    let tart = facts.tart.clone().unwrap();
    assert_eq!(tart.version, Ok("2.35.0".into()));
    assert_eq!(tart.listed, Ok(vec![Listed { name: "alloy-00000001-1".into(), image: false, running: true }]));
    let softnet = facts.softnet.clone().unwrap();
    assert!(softnet.by_sudo && !softnet.set_uid);

    let report = examine(&facts);
    let wrong: Vec<Code> =
        report.findings.iter().filter(|finding| finding.severity > Severity::Note).map(|f| f.code).collect();
    assert!(
        [Code::Identity, Code::Sleep, Code::PowerFailure, Code::Updates, Code::FileVault]
            .iter()
            .all(|code| wrong.contains(code)),
        "{wrong:?}"
    );
    assert!(
        ![Code::TartVersion, Code::Softnet, Code::ForeignVms, Code::AutoLogin, Code::DhcpLease]
            .iter()
            .any(|code| wrong.contains(code)),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn a_program_that_is_missing_or_fails_is_not_checked() {
    let mut stage = Stage::new();
    stage.world.path = stage.dir.path().join("bin").into_os_string();
    stage.program("fdesetup", "echo 'not you' >&2; exit 9");
    stage.program("tart", "echo broken");
    let facts = stage.facts().await;
    let mac = facts.mac.clone().unwrap();
    assert!(mac.version.unwrap_err().contains("no `sw_vers`"));
    let why = mac.file_vault.unwrap_err();
    assert!(why.contains("exit 9") && why.contains("not you"), "{why}");
    let tart = facts.tart.clone().unwrap();
    assert!(tart.listed.unwrap_err().contains("cannot be read"));
    assert!(facts.softnet.is_none() && facts.farm.is_none());
    let report = examine(&facts);
    assert!(report.not_checked.iter().any(|missing| missing.code == Code::FileVault));
    assert!(!report.findings.iter().any(|finding| finding.code == Code::FileVault));
}

#[tokio::test]
async fn an_orchestrator_that_is_away_is_a_finding_with_its_address() {
    let mut stage = Stage::new();
    stage.config.url = Some("http://127.0.0.1:9".into());
    let report = examine(&stage.facts().await);
    let finding = report.findings.iter().find(|finding| finding.code == Code::Orchestrator).unwrap();
    assert_eq!(finding.severity, Severity::Error);
    assert!(finding.text.contains("127.0.0.1:9"), "{finding:?}");
}

#[tokio::test]
async fn an_orchestrator_without_tls_is_told_in_one_line_with_the_address_it_may_have() {
    use tokio::io::AsyncWriteExt as _;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut stage = Stage::new();
    stage.config.url = Some(format!("https://{address}"));
    let plain = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        socket
    };
    let (facts, _socket) = tokio::join!(stage.facts(), plain);
    let report = examine(&facts);
    let finding = report.findings.iter().find(|finding| finding.code == Code::Orchestrator).unwrap();
    assert_eq!(finding.text, format!("it speaks no TLS there; http://{address} may be its address"));
}
