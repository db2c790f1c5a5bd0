//! D: what a parser says, in words for somebody who never saw the parser.

use serde_json::error::Category;

const NO_NUMBER: [&str; 4] = ["invalid digit", "number too", "cannot parse integer", "invalid float"];

/// The sentence of serde's or serde_json's without its jargon.
pub(super) fn plain(said: &str) -> String {
    let what = after_value(placed(said).0);
    if NO_NUMBER.iter().any(|start| what.starts_with(start)) {
        return "is a whole number".to_owned();
    }
    if let Some(name) = what.strip_prefix("missing field ") {
        return format!("{name} is missing");
    }
    if let Some(name) = what.strip_prefix("duplicate field ") {
        return format!("{name} is there twice");
    }
    if let Some(rest) = what.strip_prefix("unknown field ") {
        return one_of(rest, "is not known here; known are");
    }
    if let Some(rest) = what.strip_prefix("unknown variant ") {
        return one_of(rest, "is not one of");
    }
    let wrong = ["invalid type: ", "invalid value: "].iter().find_map(|start| what.strip_prefix(start));
    match wrong.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((found, expected)) => format!("is {}, not {}", noun(expected), noun(found)),
        None => what.to_owned(),
    }
}

/// The same of an error in JSON: its class tells text that is no JSON at all from JSON that is not what was asked for.
pub(super) fn plain_json(error: &serde_json::Error) -> String {
    let said = error.to_string();
    match error.classify() {
        Category::Syntax | Category::Eof => {
            let (what, place) = placed(&said);
            format!("this is no JSON{place}: {what}")
        }
        Category::Data | Category::Io => plain(&said),
    }
}

/// What is wrong, and where.
fn placed(said: &str) -> (&str, String) {
    match said.rsplit_once(" at line ") {
        Some((what, place)) => (what, format!(" (line {})", place.replace(" column", ", column"))),
        None => (said, String::new()),
    }
}

/// What was wrong with a part of a path, without the part.
fn after_value(what: &str) -> &str {
    let behind = what.strip_prefix("Cannot parse ").and_then(|rest| rest.split_once("`: "));
    behind.map_or(what, |(_, why)| why)
}

/// "`x`, expected one of `a`, `b`".
fn one_of(rest: &str, verb: &str) -> String {
    let Some((name, list)) = rest.split_once(", expected ") else {
        let (name, _) = rest.split_once(", ").unwrap_or((rest, ""));
        return format!("{name} is not known here");
    };
    let list = list.strip_prefix("one of ").unwrap_or(list).replace('`', "");
    format!("{name} {verb} {list}")
}

fn noun(kind: &str) -> &str {
    match kind {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a string" | "a borrowed string" | "string" => "text",
        "a boolean" => "true or false",
        "map" | "a map" => "an object",
        "sequence" | "a sequence" => "a list",
        "unit value" | "null" | "unit" => "null",
        other if other.starts_with("struct ") => "an object",
        other if other.starts_with("enum ") => "a word",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::{plain, plain_json};

    #[test]
    fn no_sentence_needs_a_dictionary() {
        for (said, plainly) in [
            ("missing field `role` at line 1 column 12", "`role` is missing"),
            ("duplicate field `name` at line 1 column 12", "`name` is there twice"),
            (
                "unknown field `rolle`, expected one of `name`, `role` at line 1 column 9",
                "`rolle` is not known here; known are name, role",
            ),
            ("unknown field `x`, expected `wait`", "`x` is not known here; known are wait"),
            ("unknown field `x`, there are no fields", "`x` is not known here"),
            (
                "unknown variant `king`, expected one of `viewer`, `admin` at line 1 column 2",
                "`king` is not one of viewer, admin",
            ),
            (
                "invalid type: string \"long\", expected u64 at line 1 column 2",
                "is a whole number from 0, not string \"long\"",
            ),
            (
                "invalid value: integer `-1`, expected u32 at line 1 column 2",
                "is a whole number from 0, not integer `-1`",
            ),
            ("invalid type: sequence, expected struct SubmitJob at line 1 column 0", "is an object, not a list"),
            ("invalid type: null, expected a string at line 1 column 2", "is text, not null"),
            ("invalid digit found in string", "is a whole number"),
            (
                "Cannot parse `id` with value `mini`: a worker id is written wkr_ and 26 characters",
                "a worker id is written wkr_ and 26 characters",
            ),
            (
                "a token id is written tok_ and 26 characters at line 2 column 3",
                "a token id is written tok_ and 26 characters",
            ),
        ] {
            assert_eq!(plain(said), plainly);
        }
    }

    #[test]
    fn text_that_is_no_json_is_told_from_json_of_another_form() {
        let said =
            |text: &str| plain_json(&serde_json::from_str::<std::collections::BTreeMap<String, u8>>(text).unwrap_err());
        for (text, what) in [
            ("{", "EOF"),
            ("{\"a\":1}}", "trailing characters"),
            ("{'a':1}", "key must be"),
            ("{\"a\":1e999}", "number out of range"),
            ("{\"a\":tru}", "expected ident"),
        ] {
            let said = said(text);
            assert!(said.starts_with("this is no JSON (line 1, column ") && said.contains(what), "{text}: {said}");
        }
        assert_eq!(said("[]"), "is an object, not a list");
        assert_eq!(said("{\"a\":\"expected value\"}"), "is a whole number from 0, not string \"expected value\"");
    }
}
