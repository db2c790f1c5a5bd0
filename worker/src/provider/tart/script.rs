//! D: what is sent to a guest's shell, and what comes back.
//!
//! Every command in a guest is a script on the standard input of `/bin/sh`: nothing of it is in an argument list, it
//! works the same over the agent and over SSH, and the end of it is a mark of its own in the output. The mark is the only
//! proof that the script ran to its end, it comes after every byte of the command, and it does not wait for processes
//! that the command left behind with the output open.

use bytes::{Bytes, BytesMut};

use crate::provider::Signal;

/// What reads the script: the environment is empty, the input is read to its end before anything runs.
pub(super) const READER: [&str; 5] = ["/usr/bin/env", "-i", "/bin/sh", "-c", r#"eval "$(/bin/cat)""#];

/// Where the system's own tools are, on macOS and on Linux.
const TOOLS: &str = "PATH=/usr/bin:/bin:/usr/sbin:/sbin; export PATH\n";

/// What ends a script's output. Nobody knows it before the script runs, and the command it runs never sees it. What may
/// be its beginning is kept back until more is said: it begins with a byte that no text has, so that is never the end
/// of a line that somebody waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark(String);

impl Mark {
    pub(super) fn new(secret: u64) -> Self {
        Self(format!("\u{1e}alloy-end-{secret:016x}:"))
    }

    /// The step that writes the mark and a status.
    fn step(&self, status: &str, to: &str) -> String {
        format!("printf '\\036%s%s\\n' '{}' \"{status}\" {to}\n", self.0.trim_start_matches('\u{1e}'))
    }
}

/// Quotes a word for a POSIX shell.
pub(super) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs our own steps.
pub(super) fn steps(steps: &str, mark: &Mark) -> Bytes {
    format!("{TOOLS}(\n{steps}\n) </dev/null 2>&1\n{}", mark.step("$?", "")).into()
}

/// A job's command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) argv: &'a [String],
    pub(super) env: &'a [(String, String)],
    pub(super) dir: &'a str,
    /// Where the number of its process group is left for [`signal`].
    pub(super) group: &'a str,
}

/// Runs a command in a session of its own (where there is no `setsid`: a process group), standard error with standard
/// output in the order written. What is left of the group when the command ends is killed before its end is told.
pub(super) fn job(job: &Job<'_>, mark: &Mark) -> Bytes {
    let exports: String =
        job.env.iter().map(|(key, value)| format!("{key}={}; export {key}\n", quote(value))).collect();
    let argv: Vec<String> = job.argv.iter().map(|word| quote(word)).collect();
    let (argv, dir, group) = (argv.join(" "), quote(job.dir), quote(job.group));
    let end = mark.step("$status", ">&3");
    format!(
        r#"{TOOLS}exec 3>&1 2>/dev/null
lead=$(command -v setsid) || set -m
(
exec >&3 2>&3 3>&- </dev/null
cd {dir} || exit 126
{exports}exec $lead {argv}
) &
leader=$!
printf %s "$leader" >{group}.new && mv {group}.new {group}
wait "$leader"
status=$?
kill -s KILL -- "-$leader"
{end}"#
    )
    .into()
}

/// Sends a signal to a command's group, once there is one.
pub(super) fn signal(group: &str, signal: Signal) -> String {
    let name = match signal {
        Signal::Term => "TERM",
        Signal::Kill => "KILL",
    };
    let group = quote(group);
    format!(
        r#"tries=0
until [ -s {group} ] || [ $tries -ge 50 ]; do sleep 0.1; tries=$((tries + 1)); done
leader=$(cat {group}) || exit 1
kill -s {name} -- "-$leader" 2>/dev/null || kill -s {name} "$leader" 2>/dev/null || true"#
    )
}

/// Finds the mark in a stream of chunks.
#[derive(Debug)]
pub(super) struct Unmark {
    mark: Mark,
    /// What may be the beginning of the mark, or the mark itself and what follows.
    held: BytesMut,
}

/// What a chunk came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Bytes(Bytes),
    /// These are the last bytes, and this is the script's status.
    End(Bytes, i32),
    /// The mark has no status behind it: somebody played with it. All of that is in [`Unmark::rest`].
    Torn,
}

impl Unmark {
    pub(super) fn new(mark: Mark) -> Self {
        Self { mark, held: BytesMut::new() }
    }

    pub(super) fn push(&mut self, chunk: Bytes) -> Part {
        let mark = self.mark.0.as_bytes();
        let data = if self.held.is_empty() {
            chunk
        } else {
            self.held.extend_from_slice(&chunk);
            self.held.split().freeze()
        };
        let at = memchr::memmem::find(&data, mark);
        let keep_from = at.unwrap_or_else(|| data.len() - overlap(&data, mark));
        let Some(at) = at else {
            self.held.extend_from_slice(&data[keep_from..]);
            return Part::Bytes(data.slice(..keep_from));
        };
        let tail = &data[at + mark.len()..];
        let end = tail.iter().position(|byte| *byte == b'\n');
        let status = end.map(|end| std::str::from_utf8(&tail[..end]).ok().and_then(|text| text.parse().ok()));
        match status {
            Some(Some(status)) => Part::End(data.slice(..at), status),
            None if tail.len() <= STATUS_MAX => {
                self.held.extend_from_slice(&data[at..]);
                Part::Bytes(data.slice(..at))
            }
            Some(None) | None => {
                self.held.extend_from_slice(&data);
                Part::Torn
            }
        }
    }

    /// What was kept back, of a stream that is over without its end.
    pub(super) fn rest(&mut self) -> Bytes {
        self.held.split().freeze()
    }
}

/// The digits of a status and a newline.
const STATUS_MAX: usize = 4;

/// How many of the last bytes could begin the mark.
fn overlap(data: &[u8], mark: &[u8]) -> usize {
    let most = data.len().min(mark.len() - 1);
    (1..=most).rev().find(|len| data.ends_with(&mark[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::guard::tests::eventually;

    /// What a shell makes of a script.
    fn run(script: &Bytes) -> Vec<u8> {
        let mut child = Command::new(READER[0])
            .args(&READER[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    /// Output and status, fed to the finder in chunks of this size.
    fn parted(output: &[u8], mark: &Mark, size: usize) -> (Vec<u8>, Option<i32>) {
        let (mut unmark, mut bytes) = (Unmark::new(mark.clone()), Vec::new());
        for chunk in output.chunks(size) {
            match unmark.push(Bytes::copy_from_slice(chunk)) {
                Part::Bytes(part) => bytes.extend_from_slice(&part),
                Part::End(part, status) => {
                    bytes.extend_from_slice(&part);
                    return (bytes, Some(status));
                }
                Part::Torn => break,
            }
        }
        bytes.extend_from_slice(&unmark.rest());
        (bytes, None)
    }

    #[test]
    fn a_quoted_word_is_one_word() {
        let mark = Mark::new(7);
        for word in ["", "a b", "it's", "$(id)", "\\", "line\nline", "'\"'`*"] {
            let out = run(&steps(&format!("printf %s {}", quote(word)), &mark));
            assert_eq!(parted(&out, &mark, 5), (word.as_bytes().to_vec(), Some(0)));
        }
    }

    #[test]
    fn the_end_is_found_however_the_output_is_cut() {
        let mark = Mark::new(0xabc);
        let mut output = b"\x1ealloy-end-\x1ealloy-end-000\xff\0".to_vec();
        let told = output.clone();
        output.extend_from_slice(mark.0.as_bytes());
        output.extend_from_slice(b"130\nwhat a survivor wrote later");
        for size in 1..output.len() {
            assert_eq!(parted(&output, &mark, size), (told.clone(), Some(130)), "{size}");
        }
        assert_eq!(parted(&told, &mark, 3), (told.clone(), None));
        let torn = [told.as_slice(), mark.0.as_bytes(), b"x\n"].concat();
        assert_eq!(parted(&torn, &mark, 3), (torn.clone(), None));
        assert_eq!(parted(&torn, &mark, 999), (torn.clone(), None));
    }

    #[test]
    fn a_line_that_is_not_ended_yet_is_shown_to_its_last_letter() {
        let whole: Vec<u8> = (b' '..=b'~').collect();
        for end in 1..=whole.len() {
            let line = Bytes::copy_from_slice(&whole[..end]);
            assert_eq!(Unmark::new(Mark::new(7)).push(line.clone()), Part::Bytes(line));
        }
        let name = Bytes::from_static(b"alloy-end-");
        assert_eq!(Unmark::new(Mark::new(7)).push(name.clone()), Part::Bytes(name));
    }

    #[test]
    fn a_command_has_its_own_environment_place_and_group() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_str().unwrap();
        let group = dir.path().join("group");
        let line = r#"echo "$PATH|$X|$(pwd)"; echo err >&2; (sleep 1000 &) ; sleep 1001 & kill -s TERM -- -$$"#;
        let argv = ["/bin/sh", "-c", line].map(str::to_owned);
        let env = [("PATH".to_owned(), "/bin:/usr/bin".to_owned()), ("X".to_owned(), "it's".to_owned())];
        let mark = Mark::new(9);
        let script = job(&Job { argv: &argv, env: &env, dir: place, group: group.to_str().unwrap() }, &mark);
        let (out, status) = parted(&run(&script), &mark, 4096);
        assert_eq!(String::from_utf8(out).unwrap(), format!("/bin:/usr/bin|it's|{place}\nerr\n"));
        assert_eq!(status, Some(128 + 15));
        let leader: i32 = std::fs::read_to_string(&group).unwrap().parse().unwrap();
        eventually("the group is gone", || nix::sys::signal::killpg(nix::unistd::Pid::from_raw(leader), None).err());
    }

    #[test]
    fn a_signal_waits_for_its_group_and_reaches_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let group = dir.path().join("group").to_str().unwrap().to_owned();
        let argv = ["/bin/sh", "-c", "sleep 1000 & wait"].map(str::to_owned);
        let mark = Mark::new(3);
        let script = job(&Job { argv: &argv, env: &[], dir: "/", group: &group }, &mark);
        let running = std::thread::spawn(move || run(&script));
        assert_eq!(parted(&run(&steps(&signal(&group, Signal::Term), &mark)), &mark, 99), (vec![], Some(0)));
        assert_eq!(parted(&running.join().unwrap(), &mark, 99).1, Some(143));
    }

    #[test]
    fn a_program_that_is_not_there_is_a_status() {
        let mark = Mark::new(3);
        let group = tempfile::tempdir().unwrap().path().join("g").to_str().unwrap().to_owned();
        for (program, dir, status) in [("/no/such", "/", 127), ("/bin/true", "/no/such", 126)] {
            let script = job(&Job { argv: &[program.to_owned()], env: &[], dir, group: &group }, &mark);
            assert_eq!(parted(&run(&script), &mark, 99).1, Some(status), "{program}");
        }
    }
}
