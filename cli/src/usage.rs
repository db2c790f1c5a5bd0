//! S: command lines that make no sense: what is wrong, and the line that was probably meant.

use std::io::Write as _;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory as _, Parser as _};

use crate::Cli;
use crate::output::sanitize::one_line;
use crate::output::{Failure, exit};

/// Flags before the subcommand whose next word is their value.
const WITH_VALUE: [&str; 4] = ["--url", "--context", "--dir", "-C"];
/// This many letters wrong, left out, too many or swapped is a slip of the fingers.
const SLIPS_MAX: usize = 2;

/// Says what is wrong with a command line, or shows the help that it asked for; gives the exit code.
pub(crate) fn complain(error: &clap::Error, args: &[String]) -> i32 {
    if !error.use_stderr() {
        // Nobody reads it: nothing is left to say.
        let _ = error.print();
        return exit::OK;
    }
    let advice = advice(error, args);
    let words = args.iter().take_while(|word| *word != "--");
    if words.clone().any(|word| word == "--json") {
        let failure = failure(error, advice, args);
        // A closed standard error must not end the command otherwise.
        let _ = writeln!(anstream::stderr().lock(), "{}", failure.json(exit::USAGE));
        return exit::USAGE;
    }
    match advice {
        Some(Advice { what, hints }) => {
            let mut text = format!("error: {}\n", one_line(&what));
            hints.iter().for_each(|hint| text.push_str(&format!("  hint: {}\n", one_line(hint))));
            let _ = write!(anstream::stderr().lock(), "{text}");
        }
        None => {
            let text = hushed(&error.render().ansi().to_string(), args);
            let _ = write!(anstream::stderr().lock(), "{text}");
        }
    }
    exit::USAGE
}

/// The parser's sentence without its frame.
fn failure(error: &clap::Error, advice: Option<Advice>, args: &[String]) -> Failure {
    if let Some(Advice { what, hints }) = advice {
        return Failure::usage(what).hint(hints.join("\n"));
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::usage("a subcommand is missing").hint("alloy help");
    }
    let text = hushed(&error.render().to_string(), args);
    let mut parts = text.split("\n\n");
    let message = parts.next().unwrap_or_default().trim_start_matches("error: ");
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let tips = parts.flat_map(str::lines).filter_map(|line| line.trim().strip_prefix("tip: "));
    let hint = tips.collect::<Vec<_>>().join("\n");
    Failure::usage(message).hint(if hint.is_empty() { "alloy help".to_owned() } else { hint })
}

/// What is wrong in our own words, and what to type.
#[derive(Debug, PartialEq, Eq)]
struct Advice {
    what: String,
    hints: Vec<String>,
}

fn advice(error: &clap::Error, args: &[String]) -> Option<Advice> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(_) | None => None,
    };
    let first = subcommand_at(args)?;
    let is_run = args[first] == "run";
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let wrong = named(ContextKind::InvalidSubcommand)?;
            Some(unknown_subcommand(wrong, args, first))
        }
        ErrorKind::UnknownArgument if is_run => {
            let wrong = named(ContextKind::InvalidArg)?;
            let mut equal = (first..args.len()).filter(|at| args[*at] == wrong);
            let at = equal.clone().find(|at| !is_value(args, *at)).or_else(|| equal.next())?;
            (!wrong.starts_with('-')).then(|| forgotten_dashes(&masked(args), at))
        }
        ErrorKind::MissingRequiredArgument if is_run => Some(Advice {
            what: "`alloy run` needs something to run".to_owned(),
            hints: vec![
                "alloy run -c 'make test'          a line for the shell".to_owned(),
                "alloy run -- make test            a program and its arguments, without a shell".to_owned(),
            ],
        }),
        _ => None,
    }
}

/// True if the flag before a word takes it as its value.
fn is_value(args: &[String], at: usize) -> bool {
    let before = std::iter::once("alloy").chain(args[..at].iter().map(String::as_str));
    Cli::try_parse_from(before).is_err_and(|error| error.kind() == ErrorKind::InvalidValue)
}

/// The same words without what must not be seen over a shoulder or in a log: values of variables, and tokens.
fn masked(args: &[String]) -> Vec<String> {
    let (mut is_env, mut ours) = (false, true);
    let mask = |word: &String| {
        ours &= word != "--";
        let flag =
            ["--env=", "-e=", "-e", ""].iter().find(|flag| word.starts_with(**flag)).copied().unwrap_or_default();
        let variable = std::mem::take(&mut is_env) || !flag.is_empty();
        is_env = matches!(word.as_str(), "--env" | "-e");
        match word[flag.len()..].split_once('=') {
            Some((name, _)) if variable && ours => format!("{flag}{name}=…"),
            Some(_) | None => without_token(word),
        }
    };
    args.iter().map(mask).collect()
}

/// Of a token only its prefix. A token is known by its form even if it was mistyped.
fn without_token(word: &str) -> String {
    let Some(at) = word.find("alloy_") else { return word.to_owned() };
    match word[at + "alloy_".len()..].split_once('_') {
        Some((kind, _)) => format!("{}alloy_{kind}_…", &word[..at]),
        None => word.to_owned(),
    }
}

/// The parser's text without the secrets of the command line that it quotes.
fn hushed(text: &str, args: &[String]) -> String {
    let secrets = args.iter().zip(masked(args)).filter(|(word, shown)| *word != shown);
    secrets.fold(text.to_owned(), |text, (word, shown)| text.replace(word, &shown))
}

/// Where the subcommand stands.
fn subcommand_at(args: &[String]) -> Option<usize> {
    let mut value = false;
    args.iter().position(|word| {
        if std::mem::take(&mut value) {
            return false;
        }
        value = WITH_VALUE.contains(&word.as_str());
        !word.starts_with('-')
    })
}

fn unknown_subcommand(wrong: &str, args: &[String], first: usize) -> Advice {
    let top = Cli::command();
    let at = args.iter().skip(first).position(|word| word == wrong).map_or(first, |at| at + first);
    // Of the words before it, each is the subcommand of the one before.
    let parent = args[first..at].iter().try_fold(&top, |command, word| command.find_subcommand(word)).unwrap_or(&top);
    let args = &masked(args)[..];
    let what = format!("there is no command `{}`", shown(&args[first..=at]));
    let meant = nearest(wrong, parent);
    let mut hints = Vec::new();
    if let Some(meant) = &meant {
        let line = [&args[..at], std::slice::from_ref(meant), &args[at + 1..]].concat();
        hints.push(format!("alloy {}", shown(&line)));
    } else if at == first {
        let line = [&args[..first], &["run".to_owned(), "--".to_owned()], &args[first..]].concat();
        hints.push(format!("alloy {}          runs it on the farm", shown(&line)));
    }
    let all = if at == first { "alloy help".to_owned() } else { format!("alloy help {}", shown(&args[first..at])) };
    hints.push(format!("{all}          lists the commands"));
    Advice { what, hints }
}

fn nearest(wrong: &str, parent: &Command) -> Option<String> {
    let names = parent.get_subcommands().flat_map(|command| command.get_name_and_visible_aliases());
    let near =
        names.map(|name| (slips(wrong, name), name)).filter(|(slips, name)| *slips <= SLIPS_MAX.min(name.len() - 1));
    near.min().map(|(_, name)| name.to_owned())
}

/// Letters to insert, remove, change, or swap with their neighbour, until one word is the other.
fn slips(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let differs = usize::from(a[i - 1] != b[j - 1]);
                let plain = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + differs);
                let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                if swapped { plain.min(rows[i - 2][j - 2] + 1) } else { plain }
            };
        }
    }
    rows[a.len()][b.len()]
}

/// The command's first word stands where a flag would.
fn forgotten_dashes(args: &[String], at: usize) -> Advice {
    let before = &args[..at];
    let line = before.iter().position(|word| word == "-c");
    let hint = match line {
        // `-c make test`: the line is all of it.
        Some(flag) if flag + 2 == at => {
            let line = args[flag + 1..].iter().take_while(|word| *word != "--").cloned().collect::<Vec<_>>().join(" ");
            shown(&[&args[..=flag], &[line]].concat())
        }
        Some(_) | None => {
            let before: Vec<String> = before.to_vec();
            let rest: Vec<String> = args[at..].iter().filter(|word| *word != "--").cloned().collect();
            shown(&[&before[..], &["--".to_owned()], &rest[..]].concat())
        }
    };
    Advice { what: format!("`{}` is no option of `alloy run`", args[at]), hints: vec![format!("alloy {hint}")] }
}

/// Words as a shell takes them.
fn shown(words: &[String]) -> String {
    let plain = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./:=@%+,".contains(c));
    let quoted =
        words.iter().map(|word| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &[&str]) -> Failure {
        let args: Vec<String> = line.iter().map(|word| (*word).to_owned()).collect();
        let error = Cli::try_parse_from(std::iter::once(&"alloy".to_owned()).chain(&args)).unwrap_err();
        assert!(error.use_stderr(), "{line:?}");
        let advice = advice(&error, &args);
        failure(&error, advice, &args)
    }

    #[test]
    fn the_line_that_was_meant_is_told() {
        for (line, first_hint) in [
            (&["run", "make", "all"][..], "alloy run -- make all"),
            (&["run", "--timeout", "5m", "make", "a b"], "alloy run --timeout 5m -- make 'a b'"),
            (&["run", "-c", "make", "test"], "alloy run -c 'make test'"),
            (&["run", "--label", "make", "make"], "alloy run --label make -- make"),
            (&["run", "--env", "TOKEN=hunter2", "make"], "alloy run --env 'TOKEN=…' -- make"),
            (&["worker", "jion", "http://farm", "alloy_join_abc"], "alloy worker join http://farm 'alloy_join_…'"),
            (&["run"], "alloy run -c 'make test'"),
            (&["--json", "run", "--local"], "alloy run -c 'make test'"),
            (&["rnu", "-c", "make"], "alloy run -c make"),
            (&["-C", "app", "lits"], "alloy -C app list"),
            (&["worker", "lits"], "alloy worker list"),
            (&["xcodebuild", "test"], "alloy run -- xcodebuild test"),
        ] {
            let failure = told(line);
            let hint = failure.hint.clone().unwrap_or_default();
            let first = hint.lines().next().unwrap_or_default();
            assert_eq!(first.split("          ").next(), Some(first_hint), "{line:?}: {failure:?}");
        }
    }

    #[test]
    fn every_other_mistake_is_one_sentence_of_the_parsers() {
        for (line, word) in [
            (&["list", "--state", "lost"][..], "lost"),
            (&["run", "-c", "x", "--timeot", "5m"], "--timeot"),
            (&["run", "-c", "x", "--timeout", "0s"], "longer than nothing"),
            (&["list", "-n", "0"], "0"),
            (&["worker", "drain"], "<WORKER>"),
            (&["worker"], "subcommand"),
        ] {
            let failure = told(line);
            assert!(failure.message.to_lowercase().contains(&word.to_lowercase()), "{line:?}: {failure:?}");
            assert!(!failure.message.contains('\n') && !failure.message.contains("Usage"), "{failure:?}");
            assert!(!failure.message.contains("StateWord"), "{failure:?}");
        }
    }

    #[test]
    fn no_secret_of_the_line_is_repeated() {
        for line in [
            &["run", "--env", "A=hunter2", "make"][..],
            &["run", "--env=A=hunter2", "make"],
            &["run", "-e", "A=hunter2", "make"],
            &["run", "-eA=hunter2", "make"],
            &["rnu", "--env", "A=hunter2", "-c", "make"],
            &["login", "http://farm", "alloy_pat_hunter2"],
            &["login", "--token=alloy_pat_hunter2", "http://farm"],
            &["worker", "jion", "http://farm", "alloy_jion_hunter2"],
        ] {
            let failure = told(line);
            assert!(!format!("{failure:?}").contains("hunter2"), "{line:?}: {failure:?}");
        }
    }

    #[test]
    fn slips_are_counted() {
        for (a, b, n) in
            [("run", "run", 0), ("rnu", "run", 1), ("lits", "list", 1), ("runn", "run", 1), ("up", "ls", 2)]
        {
            assert_eq!(slips(a, b), n, "{a} {b}");
        }
    }
}
