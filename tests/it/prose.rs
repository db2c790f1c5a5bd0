//! The docs promise only what exists, and what exists is documented.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use alloy_shared::env::Ms;
use alloy_shared::id::WorkerId;
use alloy_shared::limits::Limits;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{End, JobSpec, Phase, Reason};
use alloy_tests::farm::bin_dir;

use orchestrator::job::{Event, Rules, State, apply};

use crate::tidy::scan::{files_below, product_files, root};

fn page(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

#[test]
fn every_error_code_has_its_row_in_the_api_page() {
    let page = page("docs/API.md");
    for code in ErrorCode::ALL {
        let row = format!("| `{}` | {} |", code.as_str(), code.http_status());
        assert!(page.contains(&row), "docs/API.md has no row that starts `{row}`");
    }
}

/// Names of variables in the text of string literals: ours, and those that users know.
fn variables_of_the_code() -> BTreeSet<String> {
    let known = [
        "ORCHESTRATOR_URL",
        "BASE_URL",
        "TART_BASE_IMAGE",
        "VM_POOL_SIZE",
        "JOB_TIMEOUT_MINUTES",
        "DATABASE_MODE",
        "DATABASE_URL",
        "SUPABASE_URL",
        "SUPABASE_JWT_SECRET",
    ];
    let is_name =
        |text: &str| text.len() > 6 && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    let mut names = BTreeSet::new();
    for file in product_files() {
        for (_, text) in file.strings() {
            if is_name(text) && (text.starts_with("ALLOY_") || known.contains(&text)) {
                names.insert(text.to_owned());
            }
        }
    }
    names
}

const ABSENT: &str = "A command does not find";

/// What a job finds in its environment as `docs/OPERATIONS.md` has it, and what it says that a job does not find.
pub(crate) fn variables_of_a_job() -> (BTreeSet<String>, BTreeSet<String>) {
    let page = page("docs/OPERATIONS.md");
    let names = |text: &str| -> Vec<String> {
        let words = text.split('`').skip(1).step_by(2);
        words.filter(|word| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).map(str::to_owned).collect()
    };
    let table = page.split("\n\n").find(|part| part.starts_with("| Variable of a job |")).expect("a table");
    let there = table.lines().skip(2).filter_map(|row| row.split('|').nth(1)).flat_map(names).collect();
    let absent = page.split("\n\n").find(|part| part.contains(ABSENT)).expect("a paragraph");
    (there, names(absent).into_iter().filter(|name| name.contains('_')).collect())
}

#[test]
fn every_variable_is_documented_and_no_other() {
    let page = page("docs/OPERATIONS.md");
    let code = variables_of_the_code();
    let missing: Vec<_> = code.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/OPERATIONS.md does not tell of {missing:?}");
    // What a job does not find is told by name, too.
    let rest = page.split("\n\n").filter(|part| !part.contains(ABSENT));
    let told = rest.flat_map(|part| part.split('`'));
    let told = told.filter(|word| word.starts_with("ALLOY_") && !word.contains(['=', ' ', '*']));
    let unknown: Vec<_> = told.filter(|name| !code.contains(*name) && !name.starts_with("ALLOY_TEST_")).collect();
    assert!(unknown.is_empty(), "docs/OPERATIONS.md tells of {unknown:?}, which no code reads");
}

#[test]
fn how_things_end_is_told_with_the_numbers_of_the_code() {
    let page = page("docs/OPERATIONS.md");
    let (_, after) = page.split_once("## How things end").unwrap();
    let (told, _) = after.split_once("\n## ").unwrap();
    let limits = Limits::default();
    for sentence in [
        format!("gets SIGTERM and then {} s of grace", limits.cancel_grace_ms / 1_000),
        format!("below {} GiB free a worker takes no new job", alloy_shared::limits::DISK_FLOOR >> 30),
        "are kept [for a time]".to_owned(),
    ] {
        assert!(told.contains(&sentence), "docs/OPERATIONS.md does not say `{sentence}`");
    }
    let (_, hangup) = told.split_once("SIGHUP").unwrap();
    for said in [
        "`alloy run` cancels its job",
        "`alloy attach` and `alloy logs -f` let",
        "`alloy up` drains",
        "`orchestrator` does not listen to it",
        "`worker` reads its configuration again and lives on",
    ] {
        assert!(hangup.contains(said), "docs/OPERATIONS.md does not say of SIGHUP: {said}");
    }
    // Each row with its example; those that need no farm are tried.
    let home = tempfile::tempdir().unwrap();
    for code in [0, 1, 2, 4, 5, 7] {
        let row =
            told.lines().find(|line| line.starts_with(&format!("| {code} |"))).unwrap_or_else(|| panic!("{code}"));
        let example = row.rsplit('|').nth(1).unwrap().split('`').nth(1).unwrap();
        let words: Vec<&str> = example.split(' ').collect();
        assert_eq!(words[0], "alloy", "{row}");
        if matches!(code, 2 | 7) {
            let alloy = Command::new(bin_dir().join("alloy"));
            let out = { alloy }.args(&words[1..]).env("HOME", home.path()).env("ALLOY_TOKEN", "").output().unwrap();
            assert_eq!(out.status.code(), Some(code), "`{example}`: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

/// Every command line of ours in the fenced blocks of a page.
fn command_lines(page: &str) -> Vec<String> {
    let mut out = Vec::new();
    for block in page.split("```").skip(1).step_by(2) {
        for line in block.lines().skip(1) {
            let line = line.trim().trim_start_matches("$ ").trim_start();
            let line =
                line.strip_prefix("cargo run --release -- ").map_or(line.to_owned(), |rest| format!("alloy {rest}"));
            if ["alloy ", "orchestrator ", "worker "].iter().any(|program| line.starts_with(program)) {
                out.push(line);
            }
        }
    }
    out
}

/// The words of a line up to the first that is no subcommand, and all flags before `--` or `-c`.
fn parts(line: &str) -> (Vec<String>, Vec<String>) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let end = words.iter().position(|word| matches!(*word, "--" | "-c" | "#")).unwrap_or(words.len());
    let plain = |word: &&&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-');
    let path = words[..end].iter().take_while(plain).map(|word| (*word).to_owned()).collect();
    let flags = words[..end].iter().filter(|word| word.starts_with('-'));
    (path, flags.map(|flag| flag.split('=').next().unwrap_or(flag).to_owned()).collect())
}

#[test]
fn every_command_line_in_the_docs_is_one_that_the_programs_know() {
    let mut checked = 0;
    let pages = files_below(&root().join("docs"), ".md");
    for page in pages.into_iter().chain([root().join("README.md")]) {
        for line in command_lines(&fs::read_to_string(&page).unwrap()) {
            check_line(&page, &line);
            checked += 1;
        }
    }
    assert!(checked >= 10, "the docs show commands: {checked}");
}

fn check_line(page: &Path, line: &str) {
    let (path, flags) = parts(line);
    // The deepest subcommand whose help is there; an argument that looks like one ends the search.
    let help = (1..=path.len()).rev().find_map(|depth| {
        let out = Command::new(bin_dir().join(&path[0])).args(&path[1..depth]).arg("--help").output().unwrap();
        out.status.success().then(|| (depth, String::from_utf8_lossy(&out.stdout).into_owned()))
    });
    let shown = page.display();
    let (depth, help) = help.unwrap_or_else(|| panic!("{shown}: `{line}`: no such program"));
    assert!(depth > 1 || path.len() == 1, "{shown}: `{line}`: no such command");
    for flag in flags {
        assert!(help.contains(&flag), "{shown}: `{line}`: {flag} is not in the help of `{}`", path[..depth].join(" "));
    }
}

/// Every event about the newest attempt, with the words of the page.
fn events(attempt: u32) -> Vec<(String, Event)> {
    let worker = WorkerId::from_raw(1);
    let mut out = vec![
        ("given to a worker".to_owned(), Event::Assigned { worker }),
        ("accepted".to_owned(), Event::Accepted { attempt }),
        ("refused by the worker".to_owned(), Event::Refused { attempt, message: String::new() }),
        ("cancel asked".to_owned(), Event::CancelAsked { reason: Reason::UserCanceled }),
        ("no worker can get its image".to_owned(), Event::NoImage { message: String::new() }),
        ("deadline passed".to_owned(), Event::DeadlinePassed { why: String::new() }),
        ("worker lost".to_owned(), Event::Lost { attempt, reason: Reason::WorkerLost, message: String::new() }),
        ("command succeeded".to_owned(), Event::Finished { attempt, end: End::success() }),
    ];
    let ends = [Reason::ScriptFailure, Reason::RunTimeout, Reason::UserCanceled, Reason::VmLost, Reason::ConfigError];
    out.extend(
        ends.map(|reason| (format!("ended: {reason}"), Event::Finished { attempt, end: End::because(reason, "") })),
    );
    out.extend(Phase::ALL.iter().map(|phase| (phase.to_string(), Event::Phase { attempt, phase: *phase })));
    out
}

/// All transitions that are reachable from a new job, one line a pair of states.
fn transitions() -> String {
    let rules = Rules::of(&JobSpec { retries: 1, ..JobSpec::default() }, &Limits::default());
    let (mut open, mut seen) = (vec![State::new(Ms(0))], BTreeSet::new());
    let mut causes = std::collections::BTreeMap::<(String, String), BTreeSet<String>>::new();
    while let Some(state) = open.pop() {
        let attempt = state.lease().map_or(0, |lease| lease.attempt);
        for (cause, event) in events(attempt) {
            let Ok(next) = apply(&state, &event, Ms(0), &rules) else { continue };
            if next.word() != state.word() {
                causes.entry((state.word().to_string(), next.word().to_string())).or_default().insert(cause);
            }
            if seen.insert(format!("{next:?}")) && seen.len() < 10_000 {
                open.push(next);
            }
        }
    }
    let line = |((from, to), causes): (&(String, String), &BTreeSet<String>)| {
        format!("{from:10} → {to:10} {}\n", causes.iter().cloned().collect::<Vec<_>>().join("; "))
    };
    causes.iter().map(line).collect()
}

#[test]
fn the_life_of_a_job_in_the_page_is_the_one_that_the_code_allows() {
    let page = page("docs/ARCHITECTURE.md");
    let (_, after) = page.split_once("## The life of a job").unwrap();
    let (_, block) = after.split_once("```text\n").unwrap();
    let (told, _) = block.split_once("```").unwrap();
    let made = transitions();
    if std::env::var_os("ALLOY_TEST_BLESS").is_some() {
        return fs::write(root().join("docs/ARCHITECTURE.md"), page.replace(told, &made)).unwrap();
    }
    assert!(told == made, "docs/ARCHITECTURE.md should say (ALLOY_TEST_BLESS=1 writes it):\n\n{made}");
}
