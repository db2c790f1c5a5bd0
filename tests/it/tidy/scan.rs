//! Reads the repository's Rust files: finds them, blanks comments and strings, cuts off tests, finds functions.

use std::fs;
use std::path::{Path, PathBuf};

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

pub(crate) struct File {
    /// Relative to the root, with `/`.
    pub(crate) path: String,
    pub(crate) text: String,
    /// The same length, comments and the insides of literals blanked.
    pub(crate) code: String,
    /// Where the code's own tests begin.
    tests_at: usize,
}

impl File {
    pub(crate) fn read(root: &Path, path: &Path) -> File {
        let text = fs::read_to_string(path).unwrap();
        File::new(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), text)
    }

    pub(crate) fn new(path: String, text: String) -> File {
        let code = blank(&text);
        let inline = |at: &usize| code[*at..].lines().nth(1).is_some_and(|line| line.trim_end().ends_with('{'));
        let tests_at = code.match_indices("#[cfg(test)]\nmod ").map(|(at, _)| at).find(inline).unwrap_or(code.len());
        File { path, text, code, tests_at }
    }

    /// Code without comments, literals and tests.
    pub(crate) fn product(&self) -> &str {
        &self.code[..self.tests_at]
    }

    /// The insides of the string literals of the product part, with their line numbers.
    pub(crate) fn strings(&self) -> Vec<(usize, &str)> {
        let mut out = Vec::new();
        let bytes = self.code.as_bytes();
        let mut at = 0;
        while let Some(open) = self.code[at..self.tests_at].find('"').map(|found| at + found) {
            let Some(close) = self.code[open + 1..].find('"').map(|found| open + 1 + found) else { break };
            if open == 0 || bytes[open - 1] != b'\'' {
                out.push((line_of(&self.text, open), &self.text[open + 1..close]));
            }
            at = close + 1;
        }
        out
    }

    /// `D`, `P`, `S` or `T` from the first line.
    pub(crate) fn kind(&self) -> Option<char> {
        let first = self.text.lines().next()?.strip_prefix("//! ")?;
        let (kind, rest) = first.split_once(": ")?;
        (matches!(kind, "D" | "P" | "S" | "T") && !rest.is_empty()).then(|| kind.chars().next()).flatten()
    }

    /// Modules that this file declares for tests only, as paths without their ending.
    fn test_modules(&self) -> Vec<String> {
        let (dir, name) = self.path.rsplit_once('/').unwrap();
        let dir = match name {
            "mod.rs" | "lib.rs" | "main.rs" => dir.to_owned(),
            _ => format!("{dir}/{}", name.trim_end_matches(".rs")),
        };
        let declared = self.code.split("#[cfg(test)]\n").skip(1).filter_map(|rest| rest.lines().next());
        let names = declared.filter_map(|line| line.split("mod ").nth(1)?.strip_suffix(';'));
        names.map(|name| format!("{dir}/{name}")).collect()
    }

    /// `path:line` of the first occurrence of a token sequence in the product part.
    pub(crate) fn finds(&self, needle: &str) -> Option<String> {
        find_word(self.product(), needle).map(|at| format!("{}:{}", self.path, line_of(&self.text, at)))
    }

    /// Name, line and length of every function, tests included.
    pub(crate) fn functions(&self) -> Vec<(String, usize, usize)> {
        let mut out = Vec::new();
        let mut at = 0;
        while let Some(start) = find_word(&self.code[at..], "fn ").map(|found| at + found) {
            at = start + 3;
            let name: String = self.code[at..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(open) = self.code[at..].find(['{', ';']).map(|found| at + found) else { continue };
            if name.is_empty() || self.code.as_bytes()[open] == b';' {
                continue;
            }
            let Some(end) = closing(&self.code, open) else { continue };
            let (first, last) = (line_of(&self.text, start), line_of(&self.text, end));
            out.push((name, first, last - first + 1));
        }
        out
    }
}

pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// Finds `needle` where it does not continue a longer word on either side.
pub(crate) fn find_word(code: &str, needle: &str) -> Option<usize> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let (starts, ends) = (needle.starts_with(word), needle.ends_with(word));
    code.match_indices(needle).map(|(at, _)| at).find(|at| {
        let before = code[..*at].chars().next_back().is_some_and(word);
        let after = code[at + needle.len()..].chars().next().is_some_and(word);
        !(starts && before || ends && after)
    })
}

fn closing(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Every file below `dir` with this ending, sorted.
pub(crate) fn files_below(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else { return out };
    for entry in entries {
        let entry = entry.unwrap();
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            if entry.file_name() != "target" {
                out.extend(files_below(&path, ending));
            }
        } else if path.to_str().is_some_and(|name| name.ends_with(ending)) {
            out.push(path);
        }
    }
    out.sort();
    out
}

/// Files that ship: the sources of the four crates without their test modules.
pub(crate) fn product_files() -> Vec<File> {
    let root = root();
    let dirs = ["shared/src", "orchestrator/src", "worker/src", "cli/src"];
    let paths = dirs.iter().flat_map(|dir| files_below(&root.join(dir), ".rs"));
    let files: Vec<File> = paths.map(|path| File::read(&root, &path)).collect();
    let tests: Vec<String> = files.iter().flat_map(File::test_modules).collect();
    let is_test = |file: &File| {
        tests.iter().any(|test| file.path == format!("{test}.rs") || file.path.starts_with(&format!("{test}/")))
    };
    files.into_iter().filter(|file| !is_test(file)).collect()
}

pub(crate) fn all_files() -> Vec<File> {
    let root = root();
    let dirs = ["shared", "orchestrator", "worker", "cli", "tests"];
    dirs.iter().flat_map(|dir| files_below(&root.join(dir), ".rs")).map(|path| File::read(&root, &path)).collect()
}

/// Replaces comments and the insides of string and char literals by spaces, newlines kept.
pub(crate) fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => wipe(&mut out, at, line_end(bytes, at)),
            b'/' if bytes[at..].starts_with(b"/*") => wipe(&mut out, at, comment_end(bytes, at)),
            b'r' | b'b' if !follows_word(bytes, at) => match raw_string(bytes, at) {
                Some((open, close, end)) => {
                    wipe(&mut out, open, close);
                    end
                }
                None => at + 1,
            },
            b'"' => {
                let close = string_end(bytes, at + 1);
                wipe(&mut out, at + 1, close);
                close + 1
            }
            b'\'' => match char_end(bytes, at) {
                Some(close) => {
                    wipe(&mut out, at + 1, close);
                    close + 1
                }
                None => at + 1,
            },
            _ => at + 1,
        };
        at = end.max(at + 1);
    }
    String::from_utf8(out).unwrap()
}

fn wipe(out: &mut [u8], from: usize, to: usize) -> usize {
    let to = to.min(out.len());
    out[from..to].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    to
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |found| at + found)
}

fn comment_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].windows(2).position(|pair| pair == b"*/").map_or(bytes.len(), |found| at + found + 2)
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

/// Start and end of a raw string's inside, and the first byte after the literal.
fn raw_string(bytes: &[u8], at: usize) -> Option<(usize, usize, usize)> {
    let mut open = at;
    while matches!(bytes.get(open), Some(b'b' | b'r')) && open < at + 2 {
        open += 1;
    }
    if bytes[open - 1] != b'r' {
        return None;
    }
    let hashes = bytes[open..].iter().take_while(|byte| **byte == b'#').count();
    if bytes.get(open + hashes) != Some(&b'"') {
        return None;
    }
    let inside = open + hashes + 1;
    let end = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let close = inside + bytes[inside..].windows(end.len()).position(|window| window == end)?;
    Some((inside, close, close + end.len()))
}

fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at.min(bytes.len())
}

/// The closing quote of a char literal; `None` for a lifetime.
fn char_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes.get(at + 1) == Some(&b'\\') {
        return bytes[at + 3..].iter().position(|byte| *byte == b'\'').map(|found| at + 3 + found);
    }
    (at + 2..(at + 6).min(bytes.len())).find(|end| bytes[*end] == b'\'').filter(|end| {
        let inside = &bytes[at + 1..*end];
        std::str::from_utf8(inside).is_ok_and(|text| text.chars().count() == 1)
    })
}

#[test]
fn the_scanner_blanks_what_is_not_code() {
    let text = r###"fn a() { let x = "}{"; // }
    let y = '{'; let z = r#"}"}"#; let b = b"\"}"; let e = '\''; /* } */ } fn b<'a>(x: &'a str) {}"###;
    let code = blank(text);
    assert_eq!(code.len(), text.len());
    assert_eq!(code.matches('{').count(), code.matches('}').count(), "{code}");
    assert_eq!(code.matches("fn ").count(), 2);
    assert!(find_word("unbounded_channel()", "channel").is_none());
    assert!(find_word("use tokio::time::sleep;", "tokio::time").is_some());
}
