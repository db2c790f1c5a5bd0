//! The house rules as tests: kinds of code, who may use whom, sizes, links, what stands at the top.

pub(crate) mod scan;

use std::collections::BTreeSet;
use std::fs;

use scan::{File, all_files, files_below, find_word, product_files, root};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// What each kind of code may not spell.
const BANNED_BY_KIND: &[(char, &[&str])] = &[
    ('D', &["async fn", ".await", "tokio", "tracing", "Env", "dyn Store", "std::time", "std::fs", "std::net"]),
    (
        'P',
        &[
            "tokio::time",
            "tokio::fs",
            "tokio::net",
            "tokio::process",
            "tokio::task",
            "std::fs",
            "std::net",
            "std::process",
            "std::time",
            "unbounded_channel",
        ],
    ),
    ('T', &["tokio::time", "tokio::fs", "tokio::net", "tokio::process", "tokio::task", "std::fs", "std::net"]),
];

/// Paths (a prefix of the file's) and what they may not use.
const ARROWS: &[(&str, &[&str])] = &[
    ("shared/src", &["orchestrator::", "worker::", "alloy_tests"]),
    ("shared/src/wire", &["axum", "sqlx", "reqwest", "tokio::net", "tokio::time", "tokio::fs"]),
    ("orchestrator/src", &["worker::session::Core", "worker::executor", "alloy_tests", "alloy_cli"]),
    ("worker/src", &["orchestrator::", "alloy_tests", "alloy_cli", "sqlx", "axum"]),
    ("orchestrator/src/routes", &["Scope::farm(", ".commit(", "sqlx"]),
    ("orchestrator/src/ops", &["axum", "sqlx"]),
    ("orchestrator/src/hub", &["crate::session", "axum", "sqlx"]),
    ("orchestrator/src/desk.rs", &["crate::ops", "crate::hub", "crate::routes", "crate::session", "crate::logs"]),
    ("orchestrator/src/desk/", &["crate::ops", "crate::hub", "crate::routes", "crate::session", "crate::logs"]),
    ("orchestrator/src/session/core", &["crate::ops", "crate::hub", "crate::routes", "crate::logs", "sqlx"]),
];

#[test]
fn every_product_file_names_its_kind_in_the_first_line() {
    // A list of modules has no kind.
    let is_code = |line: &str| !line.trim().is_empty() && !line.contains("mod ") && line != "fn main() {}";
    let missing: Vec<_> = product_files()
        .iter()
        .filter(|file| file.product().lines().any(is_code))
        .filter(|file| file.kind().is_none())
        .map(|file| file.path.clone())
        .collect();
    assert!(missing.is_empty(), "no `//! D|P|S|T: …` in the first line of: {missing:#?}");
}

#[test]
fn no_kind_of_code_uses_what_it_may_not() {
    let mut wrong = Vec::new();
    for file in product_files() {
        for (kind, banned) in BANNED_BY_KIND {
            if file.kind() == Some(*kind) {
                wrong.extend(banned.iter().filter_map(|word| Some((file.finds(word)?, *word, *kind))));
            }
        }
    }
    assert!(wrong.is_empty(), "banned for the kind of code: {wrong:#?}");
}

#[test]
fn nobody_uses_whom_the_house_forbids() {
    let mut wrong = Vec::new();
    for file in product_files() {
        for (place, banned) in ARROWS {
            if file.path.starts_with(place) {
                wrong.extend(banned.iter().filter_map(|word| Some((file.finds(word)?, *word))));
            }
        }
        let embedded = file.path.starts_with("cli/src/farm") || !file.path.starts_with("cli/src");
        if !embedded {
            wrong.extend(["orchestrator::", "worker::"].iter().filter_map(|word| {
                let found = file.finds(word)?;
                // The wire and the commands have modules of these names.
                let own =
                    ["crate::", "super::", "path::"].iter().any(|own| file.finds(&format!("{own}{word}")).is_some());
                (!own).then_some((found, *word))
            }));
        }
    }
    assert!(wrong.is_empty(), "forbidden by the table: {wrong:#?}");
}

#[test]
fn crates_depend_in_one_direction() {
    let ours = ["alloy-shared", "orchestrator", "worker", "alloy-cli", "alloy-tests"];
    let allowed: [(&str, &[&str]); 5] = [
        ("shared", &[]),
        ("orchestrator", &["alloy-shared"]),
        ("worker", &["alloy-shared"]),
        ("cli", &["alloy-shared", "orchestrator", "worker"]),
        ("tests", &["alloy-shared", "orchestrator", "worker"]),
    ];
    for (krate, may) in allowed {
        let manifest = fs::read_to_string(root().join(krate).join("Cargo.toml")).unwrap();
        let (_, dependencies) = manifest.split_once("dependencies]").unwrap();
        for line in dependencies.lines() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or("");
            assert!(!ours.contains(&name) || may.contains(&name), "{krate} may not depend on {name}");
            let farm = krate == "cli" && matches!(name, "orchestrator" | "worker");
            assert!(!farm || line.contains("optional = true"), "{name} belongs behind the feature `farm`: {line}");
        }
    }
}

#[test]
fn jobs_change_at_the_desk_only() {
    let allowed = ["orchestrator/src/job", "orchestrator/src/desk", "orchestrator/src/pick"];
    let wrong: Vec<_> = product_files()
        .iter()
        .filter(|file| file.path.starts_with("orchestrator/src"))
        .filter(|file| !allowed.iter().any(|place| file.path.starts_with(place)))
        .filter_map(|file| file.finds("job::apply").or_else(|| file.finds("admit::admit")))
        .collect();
    assert!(wrong.is_empty(), "`apply` and `admit` are called outside the desk: {wrong:#?}");
}

#[test]
fn sql_text_stands_below_store_sql_only() {
    let starts = ["SELECT ", "INSERT INTO ", "UPDATE ", "DELETE FROM ", "CREATE TABLE ", "PRAGMA "];
    let mut wrong = Vec::new();
    for file in product_files().iter().filter(|file| !file.path.starts_with("orchestrator/src/store/sql")) {
        wrong.extend(
            file.strings()
                .into_iter()
                .filter(|(_, text)| starts.iter().any(|start| text.trim_start().starts_with(start)))
                .map(|(line, text)| format!("{}:{line}: {text}", file.path)),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_its_provider_speaks_to_tart() {
    let mut wrong = Vec::new();
    for file in product_files().iter().filter(|file| !file.path.contains("/provider/tart")) {
        wrong.extend(
            file.strings()
                .into_iter()
                .filter(|(_, text)| *text == "tart" || text.starts_with("tart "))
                .map(|(line, text)| format!("{}:{line}: {text}", file.path)),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_the_executor_calls_does_not_call_back() {
    let files = product_files();
    let stages = ["artifacts", "ctx", "hooks", "job_env", "sources", "spool", "upstream", "vm_pool"];
    let found = |name: &str| files.iter().find(|file| file.path == format!("worker/src/{name}.rs"));
    let wrong: Vec<_> =
        stages.iter().filter_map(|name| found(name).unwrap_or_else(|| panic!("{name}")).finds("executor::")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_simulated_tart_shares_nothing_with_what_it_tests() {
    // Message types in common would agree on a mistake.
    let ours = ["worker", "orchestrator", "alloy_shared", "alloy_cli"];
    let simulator = |file: &&File| file.path.starts_with("tests/src/tart/") || file.path.ends_with("bin/tart.rs");
    let files: Vec<_> = all_files();
    let wrong: Vec<_> = files
        .iter()
        .filter(simulator)
        .flat_map(|file| ours.iter().filter_map(|name| file.finds(&format!("{name}::"))))
        .collect();
    assert!(files.iter().filter(simulator).count() > 20 && wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_and_functions_stay_small() {
    let mut wrong = Vec::new();
    for file in all_files() {
        let lines = file.text.lines().count();
        if lines >= FILE_LINES_MAX {
            wrong.push(format!("{}: {lines} lines", file.path));
        }
        wrong.extend(
            file.functions()
                .into_iter()
                .filter(|(_, _, length)| *length >= FUNCTION_LINES_MAX)
                .map(|(name, line, length)| format!("{}:{line}: `{name}` has {length} lines", file.path)),
        );
    }
    assert!(wrong.is_empty(), "split by noun: {wrong:#?}");
}

#[test]
fn no_module_is_forgotten() {
    let root = root();
    let mut wrong = Vec::new();
    for file in all_files() {
        let path = root.join(&file.path);
        let (dir, name) = (path.parent().unwrap(), path.file_stem().unwrap().to_str().unwrap());
        if matches!(name, "main" | "lib" | "build") || dir.ends_with("bin") || dir.ends_with("benches") {
            continue;
        }
        let (dir, name) = match name {
            "mod" => (dir.parent().unwrap(), dir.file_name().unwrap().to_str().unwrap()),
            _ => (dir, name),
        };
        let parents = [dir.join("mod.rs"), dir.join("lib.rs"), dir.join("main.rs"), dir.with_extension("rs")];
        let declared = parents
            .iter()
            .filter_map(|parent| fs::read_to_string(parent).ok())
            .any(|parent| find_word(&scan::blank(&parent), &format!("mod {name};")).is_some());
        if !declared {
            wrong.push(file.path);
        }
    }
    assert!(wrong.is_empty(), "nobody declares: {wrong:#?}");
}

#[test]
fn no_test_is_ignored_and_none_sleeps() {
    let wrong: Vec<_> = all_files()
        .iter()
        .flat_map(|file| {
            let ignored = find_word(&file.code, "#[ignore").is_some();
            let sleeps = file.path.starts_with("tests/it") && find_word(&file.code, "sleep(").is_some();
            [ignored.then(|| format!("{}: ignored", file.path)), sleeps.then(|| format!("{}: sleeps", file.path))]
        })
        .flatten()
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_allowed_lint_has_a_reason() {
    let mut wrong = Vec::new();
    for file in product_files() {
        for (number, line) in file.text.lines().enumerate() {
            let allows = line.trim_start().starts_with("#[allow(") || line.trim_start().starts_with("#![allow(");
            let before = file.text.lines().nth(number.saturating_sub(1)).unwrap_or("");
            if allows && !line.contains("reason = ") && !before.trim_start().starts_with("//") {
                wrong.push(format!("{}:{}", file.path, number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "`#[allow]` without a reason: {wrong:#?}");
}

#[test]
fn nothing_unexpected_stands_at_the_top() {
    let expected: BTreeSet<&str> = [
        "Cargo.toml",
        "Cargo.lock",
        "orchestrator",
        "worker",
        "cli",
        "shared",
        "vm-images",
        "supabase",
        "docs",
        "tests",
        "README.md",
        "LICENSE",
    ]
    .into();
    // Made by builds and runs, and ignored by git.
    let made = ["target", "alloy-out"];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = name.starts_with('.') || expected.contains(&*name) || made.contains(&&*name);
        assert!(known, "`{name}` does not belong at the top");
    }
}

#[test]
fn every_link_in_the_docs_leads_somewhere() {
    let mut wrong = Vec::new();
    let docs = files_below(&root().join("docs"), ".md");
    for path in docs.into_iter().chain([root().join("README.md")]) {
        let text = fs::read_to_string(&path).unwrap();
        for target in links(&text) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let linked = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            let there = linked.exists() && (anchor.is_empty() || anchors(&linked).contains(anchor));
            if !there {
                wrong.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "dead links: {wrong:#?}");
}

fn links(text: &str) -> Vec<&str> {
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split_once(')').map(|(target, _)| target))
        .filter(|target| !target.contains("://") && !target.contains(' '))
        .collect()
}

/// The anchors of a page's headings, as the usual renderers make them.
fn anchors(path: &std::path::Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| line.trim_start_matches('#').trim().to_lowercase())
        .map(|title| title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).collect::<String>())
        .map(|title| title.replace(' ', "-"))
        .collect()
}

#[test]
fn the_kind_of_a_file_is_read_from_its_first_line() {
    let kind = |text: &str| File::new("x.rs".into(), text.into()).kind();
    assert_eq!(kind("//! D: decides\n"), Some('D'));
    assert_eq!(kind("//! decides\n"), None);
    assert_eq!(kind("//! X: decides\n"), None);
    assert_eq!(kind("//! T: \n"), None);
}

#[test]
fn the_simulator_runs_the_daemons_and_writes_none_of_them_again() {
    let files: Vec<_> = all_files().into_iter().filter(|file| file.path.starts_with("tests/src/sim/")).collect();
    // Whoever acts a daemon's part speaks its protocol or decides with its nouns.
    let parts = [
        "ToOrchestrator",
        "ToWorker",
        "Heartbeat",
        "reconcile",
        "fn apply",
        "fn admit",
        "fn pick_",
        "impl Desk",
        "Core::new",
        "Core::restore",
        "PoolAction",
        "job::apply",
    ];
    let wrong: Vec<_> = files.iter().flat_map(|file| parts.iter().filter_map(|part| file.finds(part))).collect();
    assert!(wrong.is_empty(), "a part of a daemon stands in the simulator: {wrong:#?}");
    for used in ["App::on(", "app.begin(", "body::run(", "drive(", "feed::follow(", "job::submit(", "job::cancel("] {
        assert!(files.iter().any(|file| file.finds(used).is_some()), "the simulator does not use {used}…");
    }
}
