//! S: which farm a command talks to, and as whom: flags, environment, named contexts, stored tokens, remembered jobs.
//!
//! The choice itself is the pure function [`choose`]. A stored token belongs to one farm's URL and goes nowhere else.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloy_shared::client::{Client, Options};
use alloy_shared::env::Env;
use alloy_shared::id::{Digest, JobId};
use alloy_shared::secret::{Secret, Token};
use serde::{Deserialize, Serialize};

use crate::output::talk::Talk;
use crate::output::{Failure, Fault};

pub(crate) const DEFAULT_URL: &str = "http://localhost:3000";
/// Who chose the farm when nobody did.
pub(crate) const DEFAULT_ORIGIN: &str = "default";
/// Directories whose latest job is remembered.
const REMEMBERED_MAX: usize = 1_000;
const NAME_MAX: usize = 63;

/// What stands on every command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Globals {
    /// Farm to talk to [env: ORCHESTRATOR_URL or ALLOY_URL; default: http://localhost:3000]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Named farm, see `alloy context` [env: ALLOY_CONTEXT]
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "url")]
    pub(crate) context: Option<String>,
    /// Use a farm inside this process, or the one of `alloy up` if it runs: nothing to set up, no isolation
    #[arg(long, global = true, conflicts_with_all = ["url", "context"])]
    pub(crate) local: bool,
    /// Write JSON to standard output, and errors as JSON to standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Behave as if started in DIR
    #[arg(short = 'C', long, global = true, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// One command's surroundings.
pub(crate) struct App {
    pub(crate) env: Arc<dyn Env>,
    pub(crate) talk: Talk,
    pub(crate) places: Places,
    pub(crate) globals: Globals,
    /// The working tree, absolute and without links.
    pub(crate) dir: PathBuf,
}

/// A farm that was chosen, and a client for it.
#[derive(Clone)]
pub(crate) struct Farm {
    pub(crate) client: Client,
    pub(crate) url: String,
    /// Under this name the latest jobs are remembered: an embedded farm changes its port with every start.
    pub(crate) name: String,
}

/// Where Alloy keeps its files for this user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) config: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) data: PathBuf,
}

impl Places {
    pub(crate) fn resolve(var: &dyn Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let home = var("HOME").filter(|home| home.starts_with('/'));
        // The XDG rule: a relative path counts as absent.
        let base = |name: &str, below_home: &str| {
            var(name)
                .filter(|path| path.starts_with('/'))
                .or_else(|| home.as_ref().map(|home| format!("{home}/{below_home}")))
                .map(|path| PathBuf::from(path).join("alloy"))
                .ok_or_else(|| Failure::error(format!("neither {name} nor HOME is set")))
        };
        let data = match var("ALLOY_DATA_DIR").filter(|path| !path.is_empty()) {
            Some(path) if path.starts_with('/') => PathBuf::from(path),
            Some(path) => return Err(Failure::usage(format!("ALLOY_DATA_DIR=`{path}` is not an absolute path"))),
            None => base("XDG_DATA_HOME", ".local/share")?,
        };
        Ok(Self {
            config: base("XDG_CONFIG_HOME", ".config")?.join("config.toml"),
            state: base("XDG_STATE_HOME", ".local/state")?,
            data,
        })
    }
}

/// `~/.config/alloy/config.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConfigFile {
    /// The context that counts when nothing else is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) contexts: BTreeMap<String, Context>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) url: String,
}

impl ConfigFile {
    pub(crate) fn load(places: &Places) -> Result<Self, Failure> {
        let path = &places.config;
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Failure::io(&path.display().to_string(), &error)),
        };
        toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            Failure::error(format!("{}:{line}: {}", path.display(), error.message()))
        })
    }

    pub(crate) fn save(&self, places: &Places) -> Result<(), Failure> {
        let text = toml::to_string(self).map_err(|error| Failure::error(format!("config.toml: {error}")))?;
        write_private(&places.config, text.as_bytes())
    }

    pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fine) {
            return Err(
                Failure::usage(format!("`{name}` is no name for a context")).hint("1 to 63 letters, digits and . - _")
            );
        }
        Ok(())
    }
}

/// The farm that counts, and who said so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) url: String,
    pub(crate) origin: String,
    pub(crate) context: Option<String>,
}

/// Decides between flags, environment, file and default, in this order.
pub(crate) fn choose(
    globals: &Globals,
    var: &dyn Fn(&str) -> Option<String>,
    file: &ConfigFile,
) -> Result<Choice, Failure> {
    let plain = |url: &str, origin: &str| {
        let url = check_url(url).map_err(|why| Failure::usage(format!("{origin}: `{}` {why}", without_user(url))))?;
        Ok(Choice { url, origin: origin.to_owned(), context: None })
    };
    let named = |name: &str, origin: &str| match file.contexts.get(name) {
        Some(context) => {
            let url = check_url(&context.url)
                .map_err(|why| Failure::error(format!("context `{name}`: `{}` {why}", without_user(&context.url))))?;
            Ok(Choice { url, origin: origin.to_owned(), context: Some(name.to_owned()) })
        }
        None => Err(Failure::usage(format!("{origin}: there is no context `{name}`")).hint("alloy context ls")),
    };
    if let Some(url) = &globals.url {
        return plain(url, "--url");
    }
    if let Some(name) = &globals.context {
        return named(name, "--context");
    }
    for name in ["ORCHESTRATOR_URL", "ALLOY_URL"] {
        if let Some(url) = var(name).filter(|url| !url.is_empty()) {
            return plain(&url, name);
        }
    }
    if let Some(name) = var("ALLOY_CONTEXT").filter(|name| !name.is_empty()) {
        return named(&name, "ALLOY_CONTEXT");
    }
    match &file.current {
        Some(name) => named(name, "config.toml"),
        None => plain(DEFAULT_URL, DEFAULT_ORIGIN),
    }
}

/// A URL as it may be shown: what stands before an `@` may be a password.
pub(crate) fn without_user(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(_, rest)| url.split_at(url.len() - rest.len()));
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}…@{host}"),
        None => url.to_owned(),
    }
}

/// Accepts `http(s)://host[:port][/prefix]`; gives it without the last slash.
pub(crate) fn check_url(url: &str) -> Result<String, String> {
    let url = url.trim().trim_end_matches('/');
    // As it stands in the API's examples: `/v1` is the API's own.
    let url = url.strip_suffix("/v1").unwrap_or(url).trim_end_matches('/');
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err("is no URL: it does not start with http:// or https://".into());
    };
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https") {
        return Err("is no URL of a farm: it does not start with http:// or https://".into());
    }
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if host.is_empty() || host.starts_with(':') {
        return Err("has no host".into());
    }
    if host.contains('@') {
        return Err("holds a user name; tokens are stored by `alloy login`".into());
    }
    if url.contains(['?', '#', '\\']) || url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("holds a character that does not belong into a farm's URL".into());
    }
    Ok(format!("{}://{}{path}", scheme.to_ascii_lowercase(), host.to_ascii_lowercase()))
}

/// The same farm under its different names for this machine is one farm.
pub(crate) fn farm_name(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => (host, port),
        Some(_) | None => (authority, if scheme == "https" { "443" } else { "80" }),
    };
    let host = if matches!(host, "127.0.0.1" | "[::1]" | "localhost") { "localhost" } else { host };
    format!("{scheme}://{host}:{port}{path}")
}

impl App {
    pub(crate) fn var(name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    pub(crate) fn choice(&self) -> Result<Choice, Failure> {
        choose(&self.globals, &Self::var, &ConfigFile::load(&self.places)?)
    }

    /// A client for the farm that counts. `--local` is the business of `farm.rs`.
    pub(crate) fn farm(&self) -> Result<Farm, Failure> {
        let choice = self.choice()?;
        let token = self.token_for(&choice.url)?.map(|(token, _)| token);
        self.farm_at(choice.url, token)
    }

    pub(crate) fn farm_at(&self, url: String, token: Option<Secret<String>>) -> Result<Farm, Failure> {
        let name = farm_name(&url);
        let agent = format!("alloy/{}", env!("CARGO_PKG_VERSION"));
        let client = Client::new(Options { url: url.clone(), token, agent }, self.env.clone())
            .map_err(|error| Failure::of(error, &url))?;
        Ok(Farm { client, url, name })
    }

    /// The token for a farm, and where it comes from.
    pub(crate) fn token_for(&self, url: &str) -> Result<Option<(Secret<String>, String)>, Failure> {
        if let Some(text) = Self::var("ALLOY_TOKEN").filter(|text| !text.is_empty()) {
            return Ok(Some((check_token(&text, "ALLOY_TOKEN")?, "ALLOY_TOKEN".to_owned())));
        }
        let path = self.token_path(url);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let origin = path.display().to_string();
                Ok(Some((check_token(&text, &origin)?, origin)))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::io(&path.display().to_string(), &error)),
        }
    }

    pub(crate) fn store_token(&self, url: &str, token: &Token) -> Result<PathBuf, Failure> {
        let path = self.token_path(url);
        write_private(&path, format!("{}\n", token.expose()).as_bytes())?;
        Ok(path)
    }

    pub(crate) fn forget_token(&self, url: &str) -> Result<(), Failure> {
        let path = self.token_path(url);
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Failure::io(&path.display().to_string(), &error)),
        }
    }

    fn token_path(&self, url: &str) -> PathBuf {
        let hash = Digest::of(farm_name(url).as_bytes()).to_string();
        self.places.state.join("tokens").join(&hash[..32])
    }

    /// Remembers the newest job that was started in this directory. Losing the note costs a look into `alloy list`.
    pub(crate) fn remember(&self, farm: &Farm, job: JobId) {
        let dir = self.places.state.join("latest");
        if let Err(failure) = write_private(&self.latest_path(farm), format!("{job}\n").as_bytes()) {
            self.talk.warn(&format!("the job is not remembered for this directory: {}", failure.message));
        }
        forget_oldest(&dir, REMEMBERED_MAX);
    }

    fn latest_path(&self, farm: &Farm) -> PathBuf {
        let mut key = farm.name.clone().into_bytes();
        key.push(0);
        key.extend_from_slice(self.dir.as_os_str().as_bytes());
        self.places.state.join("latest").join(&Digest::of(&key).to_string()[..32])
    }

    pub(crate) fn latest(&self, farm: &Farm) -> Result<JobId, Failure> {
        let none = || {
            Failure::new(Fault::NotFound, format!("no job was started from {} on {}", self.dir.display(), farm.url))
                .hint("name one: an id, its last 6 characters, or a URL; `alloy list` shows them")
        };
        let text = fs::read_to_string(self.latest_path(farm)).map_err(|_| none())?;
        text.trim().parse().map_err(|_| none())
    }
}

const NO_TOKEN: &str = "alloy login URL --with-token   signs in; in CI: set ALLOY_TOKEN to a whole token\nwho is signed in as admin makes one: alloy token create NAME";

/// Checks a token's form before it travels; the text itself is in no message. The access token of a sign-in service, which is
/// three parts, travels as it is: its form is the farm's to judge.
pub(crate) fn check_token(text: &str, origin: &str) -> Result<Secret<String>, Failure> {
    let text = text.trim();
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(&c));
    match Token::parse(text) {
        Ok(token) => Ok(Secret::new(token.expose().to_owned())),
        Err(_) if text.split('.').count() == 3 && text.split('.').all(is_part) => Ok(Secret::new(text.to_owned())),
        Err(why) => Err(Failure::new(Fault::Unauthenticated, format!("{origin} holds no token: {why}")).hint(NO_TOKEN)),
    }
}

/// Replaces a file by one that only its owner can read.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let fail = |error: std::io::Error| Failure::io(&path.display().to_string(), &error);
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(fail)?;
    }
    let temp = path.with_extension(format!("{}.new", std::process::id()));
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)
    };
    write().map_err(|error| {
        // What is left of a failed write is worth nothing.
        let _ = fs::remove_file(&temp);
        fail(error)
    })
}

fn forget_oldest(dir: &Path, keep: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut notes: Vec<_> =
        entries.flatten().filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    if notes.len() <= keep {
        return;
    }
    notes.sort();
    let surplus = notes.len() - keep;
    for (_, path) in notes.into_iter().take(surplus) {
        // Another process may have removed it already.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn vars(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    fn file() -> ConfigFile {
        toml::from_str("current = \"office\"\n[contexts.office]\nurl = \"http://office:3000\"\n[contexts.home]\nurl = \"https://home/\"\n")
            .unwrap()
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let globals = |url: Option<&str>, context: Option<&str>| Globals {
            url: url.map(str::to_owned),
            context: context.map(str::to_owned),
            ..Globals::default()
        };
        let full: &[(&str, &str)] =
            &[("ORCHESTRATOR_URL", "http://env:1"), ("ALLOY_URL", "http://other:1"), ("ALLOY_CONTEXT", "home")];
        let none: &[(&str, &str)] = &[];
        for (flags, env, file, url, origin) in [
            (globals(Some("http://flag:9/"), None), full, file(), "http://flag:9", "--url"),
            (globals(None, Some("home")), full, file(), "https://home", "--context"),
            (globals(None, None), full, file(), "http://env:1", "ORCHESTRATOR_URL"),
            (globals(None, None), &full[1..], file(), "http://other:1", "ALLOY_URL"),
            (globals(None, None), &full[2..], file(), "https://home", "ALLOY_CONTEXT"),
            (globals(None, None), none, file(), "http://office:3000", "config.toml"),
            (globals(None, None), none, ConfigFile::default(), DEFAULT_URL, "default"),
        ] {
            let choice = choose(&flags, &vars(env), &file).unwrap();
            assert_eq!((choice.url.as_str(), choice.origin.as_str()), (url, origin));
        }
        assert_eq!(choose(&globals(None, Some("nope")), &vars(none), &file()).unwrap_err().fault, Fault::Usage);
        assert!(choose(&globals(Some("farm:3000"), None), &vars(none), &file()).is_err());
    }

    #[test]
    fn urls_are_checked() {
        for (url, expected) in [
            ("HTTP://Farm.Local:3000/", "http://farm.local:3000"),
            ("https://x/prefix//", "https://x/prefix"),
            ("http://x:1/v1/", "http://x:1"),
        ] {
            assert_eq!(check_url(url).unwrap(), expected);
        }
        for url in ["", "farm", "ftp://x", "http://", "http://:80", "http://u:p@x", "http://x?y=1", "http://x y"] {
            assert!(check_url(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_password_in_a_url_is_not_shown() {
        for url in ["http://me:hush@farm:1", "me:hush@farm:1", "https://me:hu/sh@x@farm:1/p"] {
            let shown = without_user(url);
            assert!(shown.contains("…@farm:1") && !shown.contains("hu"), "{shown}");
            let globals = Globals { url: Some(url.to_owned()), ..Globals::default() };
            let failure = choose(&globals, &vars(&[]), &ConfigFile::default());
            assert!(failure.is_ok() || !failure.unwrap_err().message.contains("hu"), "{url}");
        }
        assert_eq!(without_user("http://farm:1/p"), "http://farm:1/p");
    }

    #[test]
    fn what_cannot_be_a_token_leaves_one_without_a_sign_in() {
        let failure = check_token("alloy_pat_short", "ALLOY_TOKEN").unwrap_err();
        let told = failure.json(failure.exit_code(false));
        assert_eq!((&told["code"], &told["exit_code"]), (&"unauthenticated".into(), &4.into()));
        assert!(failure.message.starts_with("ALLOY_TOKEN holds no token: ") && !failure.message.contains("short"));
        assert!(failure.hint.unwrap().contains("alloy login"));
        assert_eq!(check_token(" a-.b_.9 \n", "ALLOY_TOKEN").unwrap().expose(), "a-.b_.9", "a sign-in service's");
        for bad in ["a.b", "a.b.c.d", "a..c", "a.b.c d"] {
            assert!(check_token(bad, "ALLOY_TOKEN").is_err(), "{bad}");
        }
    }

    #[test]
    fn one_farm_has_one_name() {
        for url in ["http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000"] {
            assert_eq!(farm_name(url), "http://localhost:3000");
        }
        assert_eq!(farm_name("https://farm"), farm_name("https://farm:443"));
        assert_ne!(farm_name("http://farm"), farm_name("https://farm"));
        assert_ne!(farm_name("http://localhost:3000"), farm_name("http://localhost:3001"));
    }

    #[test]
    fn places_follow_xdg_and_ignore_relative_paths() {
        let places = Places::resolve(&vars(&[("HOME", "/h")])).unwrap();
        assert_eq!(places.config, Path::new("/h/.config/alloy/config.toml"));
        assert_eq!(places.data, Path::new("/h/.local/share/alloy"));
        let env: &[(&str, &str)] =
            &[("HOME", "/h"), ("XDG_CONFIG_HOME", "/c"), ("XDG_STATE_HOME", "rel"), ("ALLOY_DATA_DIR", "/d")];
        let places = Places::resolve(&vars(env)).unwrap();
        assert_eq!(places.config, Path::new("/c/alloy/config.toml"));
        assert_eq!(places.state, Path::new("/h/.local/state/alloy"));
        assert_eq!(places.data, Path::new("/d"));
        assert!(Places::resolve(&vars(&[])).is_err());
        assert!(Places::resolve(&vars(&[("HOME", "/h"), ("ALLOY_DATA_DIR", "rel")])).is_err());
    }

    #[test]
    fn a_private_file_is_private_and_the_config_survives_itself() {
        let dir = tempfile::tempdir().unwrap();
        let places =
            Places { config: dir.path().join("c/config.toml"), state: dir.path().into(), data: dir.path().into() };
        assert_eq!(ConfigFile::load(&places).unwrap(), ConfigFile::default());
        file().save(&places).unwrap();
        assert_eq!(ConfigFile::load(&places).unwrap(), file());
        assert_eq!(fs::metadata(&places.config).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&places.config, "current = \"x\"\nbogus = 1\n").unwrap();
        let failure = ConfigFile::load(&places).unwrap_err();
        assert!(failure.message.contains("config.toml:2: ") && failure.message.contains("bogus"), "{failure:?}");
    }

    #[test]
    fn only_the_newest_notes_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..7 {
            let file = fs::File::create(dir.path().join(n.to_string())).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000 + n)).unwrap();
        }
        forget_oldest(dir.path(), 3);
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["4", "5", "6"]);
    }
}
