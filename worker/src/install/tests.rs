use std::fs;

use super::*;

fn service(manager: Manager) -> Service {
    let home = PathBuf::from("/Users/farm");
    let config_home = home.join(".config");
    let mut command: Vec<String> =
        ["/opt/alloy/bin/worker", "run", "--state-dir", "/Users/farm/it's 100% \"$HOME\" & <b>\\"]
            .map(str::to_owned)
            .to_vec();
    if let Manager::LaunchAgent { .. } = manager {
        command.extend(["--log-file".to_owned(), Service::log_file(&home, SERVICE).display().to_string()]);
    }
    let variables = [("TART_BASE_IMAGE", "registry/mac@sha256:0"), ("ALLOY_LABELS", "a=1,b=$x%")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let path = service_path(&manager, "/usr/bin:/opt/tools/bin:relative");
    Service { name: SERVICE.to_owned(), manager, command, variables, home, config_home, path }
}

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/install").join(name);
    if std::env::var_os("ALLOY_BLESS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let want = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, want, "{name} is another file now; ALLOY_BLESS=1 writes it");
}

#[test]
fn the_files_are_the_ones_that_were_looked_at() {
    for (name, manager) in [
        ("launch_agent.plist", Manager::LaunchAgent { uid: 501 }),
        ("user.service", Manager::UserUnit),
        ("system.service", Manager::SystemUnit { user: "farm".to_owned() }),
    ] {
        golden(name, &service(manager).plan().unwrap().file.text);
    }
}

#[test]
fn a_launch_agent_is_read_back_as_it_was_meant() {
    let service = service(Manager::LaunchAgent { uid: 501 });
    let plan = service.plan().unwrap();
    let read = Value::from_reader_xml(plan.file.text.as_bytes()).unwrap();
    let agent = read.as_dictionary().unwrap();
    let words: Vec<&str> =
        agent["ProgramArguments"].as_array().unwrap().iter().map(|word| word.as_string().unwrap()).collect();
    assert_eq!(words, service.command);
    let variables = agent["EnvironmentVariables"].as_dictionary().unwrap();
    assert_eq!(variables["ALLOY_LABELS"].as_string(), Some("a=1,b=$x%"));
    assert_eq!(variables["PATH"].as_string(), Some(&*format!("{LAUNCH_PATH}:/opt/tools/bin")));
    assert_eq!(agent["LimitLoadToSessionType"].as_string(), Some("Aqua"));
    assert_eq!(plan.file.path, Path::new("/Users/farm/Library/LaunchAgents/alloy-worker.plist"));
    let steps: Vec<String> = plan.steps.iter().map(|step| step.argv.join(" ")).collect();
    assert_eq!(
        steps,
        [
            "launchctl bootout gui/501/alloy-worker",
            "launchctl enable gui/501/alloy-worker",
            "launchctl bootstrap gui/501 /Users/farm/Library/LaunchAgents/alloy-worker.plist",
        ]
    );
    assert_eq!(service.removal().before[0].argv.join(" "), steps[0]);
}

#[test]
fn a_unit_is_of_the_user_or_of_the_system() {
    let user = service(Manager::UserUnit);
    assert_eq!(user.file(), Path::new("/Users/farm/.config/systemd/user/alloy-worker.service"));
    let steps: Vec<String> = user.plan().unwrap().steps.iter().map(|step| step.argv.join(" ")).collect();
    assert_eq!(steps[1], "systemctl --user enable alloy-worker.service");
    assert_eq!(user.removal().before[0].argv.join(" "), "systemctl --user disable --now alloy-worker.service");
    let system = service(Manager::SystemUnit { user: "farm".to_owned() });
    assert_eq!(system.file(), Path::new("/etc/systemd/system/alloy-worker.service"));
    let steps: Vec<String> = system.plan().unwrap().steps.iter().map(|step| step.argv.join(" ")).collect();
    assert_eq!(
        steps,
        ["daemon-reload", "enable alloy-worker.service", "restart alloy-worker.service"]
            .map(|rest| format!("systemctl {rest}"))
    );
}

#[test]
fn a_line_break_never_becomes_a_line_of_the_unit() {
    let mut service = service(Manager::UserUnit);
    service.variables.insert("ALLOY_LOG".to_owned(), "info\nExecStartPre=/bin/evil".to_owned());
    assert!(service.plan().unwrap_err().contains("cannot hold"));
}

#[test]
fn a_name_is_no_path_and_no_flag() {
    for name in ["alloy-worker", "w2", "a.b_c-1"] {
        check_name(name).unwrap();
    }
    for name in ["", "-x", "../x", "a/b", "a b", ".hidden", &"x".repeat(65)] {
        check_name(name).unwrap_err();
    }
}

#[test]
fn nothing_secret_is_carried_into_a_file_that_all_can_read() {
    for name in CARRIED {
        assert!(!["TOKEN", "PASSWORD", "SECRET", "KEY"].iter().any(|word| name.contains(word)), "{name}");
    }
}
