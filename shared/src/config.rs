//! D: from flags, environment, file and defaults to values with their origin. Every problem is reported, not the first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use toml::de::{DeTable, DeValue};

use crate::id::printable;
use crate::secret::Secret;

/// One thing that can be set, and under which names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// In the file, and in what is shown. `limits.boot` stands in the file's table `[limits]`.
    pub name: &'static str,
    /// `--name` on the command line.
    pub flag: Option<&'static str>,
    pub variable: Option<&'static str>,
}

/// Where a value comes from. A flag beats a variable, a variable beats the file, the file beats the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Flag(&'static str),
    Variable(&'static str),
    /// `path:line`.
    File(String),
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => f.write_str(flag),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::File(path) => f.write_str(path),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value as it came to be, for `config show --origin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    pub value: String,
    pub origin: Origin,
}

/// Something that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub name: String,
    pub origin: Origin,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.name, self.origin, self.message)
    }
}

/// A configuration file: its path for messages, and its text.
#[derive(Debug, Clone)]
pub struct File {
    pub path: String,
    pub text: String,
}

/// The layers below each other. Take one value after the other, then finish.
#[derive(Debug)]
pub struct Layers {
    flags: BTreeMap<&'static str, String>,
    variables: BTreeMap<String, String>,
    file: BTreeMap<String, Item>,
    asked: BTreeSet<&'static str>,
    settings: Vec<Setting>,
    problems: Vec<Problem>,
}

impl Layers {
    /// `flags` are those that were given, by their [`Key::flag`]. An empty variable counts as not set.
    pub fn new(
        flags: impl IntoIterator<Item = (&'static str, String)>,
        variables: impl IntoIterator<Item = (String, String)>,
        file: Option<File>,
    ) -> Self {
        let mut layers = Self {
            flags: flags.into_iter().collect(),
            variables: variables.into_iter().filter(|(_, value)| !value.is_empty()).collect(),
            file: BTreeMap::new(),
            asked: BTreeSet::new(),
            settings: Vec::new(),
            problems: Vec::new(),
        };
        if let Some(file) = file {
            layers.read(file);
        }
        layers
    }

    fn read(&mut self, file: File) {
        let place = Place { path: &file.path, text: &file.text };
        let (table, errors) = DeTable::parse_recoverable(&file.text);
        if errors.is_empty() {
            flatten(&place, "", table.get_ref(), &mut self.file);
        }
        // One slip often makes several errors on its line; and the values around it are not to be trusted.
        let mut lines = BTreeMap::new();
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            lines.entry(place.line(at)).or_insert_with(|| (place.origin(at), error.message().to_owned()));
        }
        for (origin, message) in lines.into_values() {
            self.problem("the file", origin, message);
        }
    }

    /// The value of a key from the highest layer that has it. What cannot be used is noted, and the default stands in.
    pub fn take<T: fmt::Display>(&mut self, key: Key, default: T, parse: impl Fn(&str) -> Result<T, String>) -> T {
        match self.take_given(key, parse) {
            Some(value) => value,
            None => {
                // The setting that stands for "not given", or for one that cannot be used.
                if let Some(setting) = self.settings.last_mut() {
                    setting.value = default.to_string();
                }
                default
            }
        }
    }

    /// The same without a default: `None` if no layer has it.
    pub fn take_given<T: fmt::Display>(&mut self, key: Key, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.asked.insert(key.name);
        let Some((text, origin)) = self.find(key) else {
            self.settings.push(Setting { name: key.name, value: String::new(), origin: Origin::Default });
            return None;
        };
        let value = parse(&text);
        let shown = value.as_ref().map(T::to_string).unwrap_or_default();
        self.settings.push(Setting { name: key.name, value: shown, origin: origin.clone() });
        value.map_err(|why| self.problem(key.name, origin, format!("`{}` {why}", printable(&text)))).ok()
    }

    /// A value that is shown nowhere, neither in the settings nor in a problem. `why` says what is wrong with a bad one.
    pub fn take_secret<T>(
        &mut self,
        key: Key,
        why: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<Secret<T>> {
        self.asked.insert(key.name);
        let Some((text, origin)) = self.find(key) else {
            self.settings.push(Setting { name: key.name, value: String::new(), origin: Origin::Default });
            return None;
        };
        self.settings.push(Setting { name: key.name, value: "***".to_owned(), origin: origin.clone() });
        let value = parse(&text);
        if value.is_none() {
            self.problem(key.name, origin, format!("the value {why}"));
        }
        value.map(Secret::new)
    }

    fn find(&mut self, key: Key) -> Option<(String, Origin)> {
        if let Some((flag, text)) = key.flag.and_then(|flag| Some((flag, self.flags.remove(flag)?))) {
            return Some((text, Origin::Flag(flag)));
        }
        if let Some((name, text)) = key.variable.and_then(|name| Some((name, self.variables.get(name)?))) {
            return Some((text.clone(), Origin::Variable(name)));
        }
        let item = self.file.get(key.name)?;
        let origin = item.origin.clone();
        match item.text.clone() {
            Some(text) => Some((text, origin)),
            None => {
                self.problem(key.name, origin, "is a text, a number, true or false, or a list of them".to_owned());
                None
            }
        }
    }

    /// Notes a problem between several values.
    pub fn problem(&mut self, name: &str, origin: Origin, message: String) {
        self.problems.push(Problem { name: name.to_owned(), origin, message });
    }

    /// Where the value of this key came from; `Default` if nobody took it yet.
    pub fn origin(&self, key: Key) -> Origin {
        self.settings.iter().find(|set| set.name == key.name).map_or(Origin::Default, |set| set.origin.clone())
    }

    /// All values with their origins, in the order in which they were taken, or all problems. A key in the file that
    /// nobody asked for is one: it is a typing error more often than not.
    pub fn finish(mut self) -> Result<Vec<Setting>, Vec<Problem>> {
        let mut unknown: Vec<(String, Origin)> = Vec::new();
        for (name, item) in &self.file {
            let above = |table: &str, name: &str| name.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
            let known = self.asked.iter().any(|key| *key == name.as_str() || above(key, name) || above(name, key));
            // Of a table that nobody knows, its own name is enough.
            if !known && !unknown.iter().any(|(table, _)| above(table, name)) {
                unknown.push((name.clone(), item.origin.clone()));
            }
        }
        for (name, origin) in unknown {
            let message = no_such_key(&self.asked, &name);
            self.problem(&printable(&name), origin, message);
        }
        if self.problems.is_empty() { Ok(self.settings) } else { Err(self.problems) }
    }
}

/// A value of the file as a flag would have it; `None` if a flag cannot say it.
#[derive(Debug)]
struct Item {
    text: Option<String>,
    origin: Origin,
}

struct Place<'a> {
    path: &'a str,
    text: &'a str,
}

impl Place<'_> {
    fn line(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }
    fn origin(&self, at: usize) -> Origin {
        Origin::File(format!("{}:{}", self.path, self.line(at)))
    }
}

/// Every entry by its full name; a table is one itself, and so is all that stands in it.
fn flatten(place: &Place<'_>, prefix: &str, table: &DeTable<'_>, out: &mut BTreeMap<String, Item>) {
    for (name, value) in table {
        let full = format!("{prefix}{}", name.get_ref());
        if let DeValue::Table(inner) = value.get_ref() {
            flatten(place, &format!("{full}."), inner, out);
        }
        out.insert(full, Item { text: plain(value.get_ref()), origin: place.origin(name.span().start) });
    }
}

/// A list is joined by commas, and so are a table's `key=value` pairs.
fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string()),
        DeValue::Boolean(yes) => Some(yes.to_string()),
        DeValue::Array(list) => {
            let simple = |item: &DeValue<'_>| if item.is_table() { None } else { plain(item) };
            Some(list.iter().map(|item| simple(item.get_ref())).collect::<Option<Vec<_>>>()?.join(","))
        }
        DeValue::Table(pairs) => {
            let pair = |name: &str, value: &DeValue<'_>| match value {
                DeValue::Array(_) | DeValue::Table(_) => None,
                value => Some(format!("{name}={}", plain(value)?)),
            };
            let pairs = pairs.iter().map(|(name, value)| pair(name.get_ref(), value.get_ref()));
            Some(pairs.collect::<Option<Vec<_>>>()?.join(","))
        }
        DeValue::Float(_) | DeValue::Datetime(_) => None,
    }
}

fn no_such_key(known: &BTreeSet<&'static str>, name: &str) -> String {
    let own = name.rsplit('.').next().unwrap_or(name).len();
    match known.iter().map(|key| (distance(key, name), *key)).min() {
        Some((steps, key)) if steps <= 1 + own / 4 => format!("there is no such key; is `{key}` meant?"),
        Some(_) | None => {
            let known: Vec<&str> = known.iter().copied().collect();
            format!("there is no such key; the keys are {}", known.join(", "))
        }
    }
}

/// How many letters have to change, come or go.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let change = corner + usize::from(from != *to);
            corner = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// Reads `250ms`, `90s`, `5m`, `2h`, `1d`, and sums such as `1h30m`, as milliseconds.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    let wrong = || "is not a duration such as 90s, 5m or 1h30m".to_owned();
    let mut rest = text.trim();
    let mut total = 0u64;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?);
        let (unit, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
        let ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let part = number.parse::<u64>().ok().and_then(|number| number.checked_mul(ms)).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = tail.trim_start();
    }
    Ok(total)
}

/// Parses by `FromStr`, with the reason in place of the parser's own words.
pub fn parse<T: std::str::FromStr>(why: &'static str) -> impl Fn(&str) -> Result<T, String> {
    move |text| text.trim().parse().map_err(|_| why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: Key = Key { name: "port", flag: Some("--port"), variable: Some("PORT") };
    const NAME: Key = Key { name: "name", flag: None, variable: Some("NAME") };
    const BOOT: Key = Key { name: "limits.boot", flag: None, variable: None };

    fn text(text: &str) -> Result<String, String> {
        Ok(text.to_owned())
    }

    fn layers(flag: Option<&str>, variable: Option<&str>, file: Option<&str>) -> Layers {
        Layers::new(
            flag.map(|text| ("--port", text.to_owned())),
            variable.map(|text| ("PORT".to_owned(), text.to_owned())),
            file.map(|text| File { path: "x.toml".into(), text: text.into() }),
        )
    }

    fn port(layers: &mut Layers) -> u16 {
        layers.take(PORT, 1, parse("is no port"))
    }

    #[test]
    fn the_highest_layer_wins_and_is_named() {
        let file = Some("port = 4");
        for (flag, variable, file, value, origin) in [
            (Some("2"), Some("3"), file, 2, Origin::Flag("--port")),
            (None, Some("3"), file, 3, Origin::Variable("PORT")),
            (None, Some(""), file, 4, Origin::File("x.toml:1".into())),
            (None, None, Some(""), 1, Origin::Default),
            (None, None, None, 1, Origin::Default),
        ] {
            let mut layers = layers(flag, variable, file);
            assert_eq!(port(&mut layers), value);
            assert_eq!(layers.origin(PORT), origin);
            assert_eq!(layers.finish().unwrap(), [Setting { name: "port", value: value.to_string(), origin }]);
        }
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let file = "name = { a = { b = 1 } }\nprot = 5\n\n[other]\nx = 1\n[limits]\nboot = \"soon\"\ncolour = 1\n";
        let mut layers = layers(None, Some("many"), Some(file));
        assert_eq!(port(&mut layers), 1);
        layers.take(NAME, String::from("n"), text);
        layers.take(BOOT, 5, duration_ms);
        layers.problem("port", layers.origin(PORT), "is the same as the other one".to_owned());
        let told: Vec<String> = layers.finish().unwrap_err().iter().map(Problem::to_string).collect();
        assert_eq!(
            told,
            [
                "port (environment PORT): `many` is no port",
                "name (x.toml:1): is a text, a number, true or false, or a list of them",
                "limits.boot (x.toml:7): `soon` is not a duration such as 90s, 5m or 1h30m",
                "port (environment PORT): is the same as the other one",
                "limits.colour (x.toml:8): there is no such key; the keys are limits.boot, name, port",
                "other (x.toml:4): there is no such key; the keys are limits.boot, name, port",
                "prot (x.toml:2): there is no such key; is `port` meant?",
            ]
        );
    }

    #[test]
    fn a_file_that_is_no_toml_is_a_problem_for_each_line_that_is_none() {
        let mut layers = layers(None, None, Some("port = = 3\nname = \"x\"\nnonsense\n"));
        port(&mut layers);
        let told: Vec<(String, Origin)> =
            layers.finish().unwrap_err().into_iter().map(|problem| (problem.name, problem.origin)).collect();
        let at = |line: usize| ("the file".to_owned(), Origin::File(format!("x.toml:{line}")));
        assert_eq!(told, [at(1), at(3)]);
    }

    #[test]
    fn lists_and_pairs_in_the_file_are_lists_on_the_command_line() {
        for file in [
            "name = [\"a=1\", \"b=0x2\"]",
            "name = { a = 1, b = \"0x2\" }",
            "[name]\na = 1\nb = \"0x2\"",
            "name.a = 0x1\nname.b = \"0x2\"",
        ] {
            let mut layers = layers(None, None, Some(file));
            assert_eq!(layers.take(NAME, String::new(), text), "a=1,b=0x2", "{file}");
            layers.finish().unwrap();
        }
    }

    #[test]
    fn what_is_not_given_has_no_value_and_the_default_of_what_is_bad_is_shown() {
        let mut layers = layers(None, Some("many"), None);
        assert_eq!(layers.take_given(NAME, text), None);
        assert_eq!(port(&mut layers), 1);
        let shown: Vec<&str> = layers.settings.iter().map(|setting| setting.value.as_str()).collect();
        assert_eq!(shown, ["", "1"]);
    }

    #[test]
    fn a_secret_is_shown_nowhere() {
        let mut layers = layers(None, Some("hunter2"), None);
        assert_eq!(layers.take_secret(NAME, "is no token", |text| Some(text.to_owned())), None);
        let secret = layers.take_secret(PORT, "is no token", |text| Some(text.to_owned())).unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(layers.take_secret(PORT, "is no token", |_| None::<String>), None);
        let shown: Vec<&str> = layers.settings.iter().map(|setting| setting.value.as_str()).collect();
        assert_eq!(shown, ["", "***", "***"]);
        let told: Vec<String> = layers.finish().unwrap_err().iter().map(Problem::to_string).collect();
        assert_eq!(told, ["port (environment PORT): the value is no token"]);
    }

    #[test]
    fn durations_are_read_or_refused() {
        for (text, ms) in
            [("250ms", 250), ("90s", 90_000), ("5m", 300_000), ("1h30m", 5_400_000), (" 2d 1min ", 172_860_000)]
        {
            assert_eq!(duration_ms(text), Ok(ms), "{text}");
        }
        for text in ["", "5", "s", "5 s", "-5s", "1.5h", "5w", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration_ms(text).is_err(), "{text}");
        }
    }
}
