//! D: from flags, environment, file and defaults to values with their origin. Every problem is reported, not the first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::id::printable;

/// One thing that can be set, and under which names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// In the file, and in what is shown.
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
    file: BTreeMap<String, toml::Value>,
    path: String,
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
            path: String::new(),
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
        self.path = file.path;
        match file.text.parse::<toml::Table>() {
            Ok(table) => self.file = table.into_iter().collect(),
            Err(error) => self.problem("the file", Origin::File(self.path.clone()), error.message().to_owned()),
        }
    }

    /// The value of a key from the highest layer that has it. What cannot be used is noted, and the default stands in.
    pub fn take<T: fmt::Display>(&mut self, key: Key, default: T, parse: impl Fn(&str) -> Result<T, String>) -> T {
        self.asked.insert(key.name);
        let Some((text, origin)) = self.find(key) else {
            self.settings.push(Setting { name: key.name, value: default.to_string(), origin: Origin::Default });
            return default;
        };
        let value = match parse(&text) {
            Ok(value) => value,
            Err(why) => {
                self.problem(key.name, origin.clone(), format!("`{}` {why}", printable(&text)));
                default
            }
        };
        self.settings.push(Setting { name: key.name, value: value.to_string(), origin });
        value
    }

    fn find(&mut self, key: Key) -> Option<(String, Origin)> {
        if let Some((flag, text)) = key.flag.and_then(|flag| Some((flag, self.flags.remove(flag)?))) {
            return Some((text, Origin::Flag(flag)));
        }
        if let Some((name, text)) = key.variable.and_then(|name| Some((name, self.variables.get(name)?))) {
            return Some((text.clone(), Origin::Variable(name)));
        }
        let origin = Origin::File(self.path.clone());
        match plain(self.file.get(key.name)?) {
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
        let unknown: Vec<String> =
            self.file.keys().filter(|name| !self.asked.contains(name.as_str())).cloned().collect();
        for name in unknown {
            let known: Vec<&str> = self.asked.iter().copied().collect();
            let message = format!("there is no such key; the keys are {}", known.join(", "));
            self.problem(&printable(&name), Origin::File(self.path.clone()), message);
        }
        if self.problems.is_empty() { Ok(self.settings) } else { Err(self.problems) }
    }
}

/// A file's value as a flag would have it; a list is joined by commas.
fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(yes) => Some(yes.to_string()),
        toml::Value::Array(list) => Some(list.iter().map(plain).collect::<Option<Vec<_>>>()?.join(",")),
        toml::Value::Float(_) | toml::Value::Datetime(_) | toml::Value::Table(_) => None,
    }
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
            (None, Some(""), file, 4, Origin::File("x.toml".into())),
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
        let mut layers = layers(None, Some("many"), Some("name = { a = 1 }\nprot = 5"));
        assert_eq!(port(&mut layers), 1);
        layers.take(NAME, String::from("n"), |text| Ok(text.to_owned()));
        let told: Vec<String> = layers.finish().unwrap_err().iter().map(Problem::to_string).collect();
        assert_eq!(
            told,
            [
                "port (environment PORT): `many` is no port",
                "name (x.toml): is a text, a number, true or false, or a list of them",
                "prot (x.toml): there is no such key; the keys are name, port",
            ]
        );
    }

    #[test]
    fn a_file_that_is_no_toml_is_one_problem() {
        let mut layers = layers(None, None, Some("port = = 3"));
        port(&mut layers);
        let problems = layers.finish().unwrap_err();
        assert_eq!((problems.len(), problems[0].name.as_str()), (1, "the file"));
    }

    #[test]
    fn a_list_in_the_file_is_a_list_on_the_command_line() {
        let mut layers = layers(None, None, Some("name = [\"a=1\", \"b=2\"]"));
        assert_eq!(layers.take(NAME, String::new(), |text| Ok(text.to_owned())), "a=1,b=2");
        layers.finish().unwrap();
    }
}
