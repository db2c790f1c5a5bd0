//! D: which files look like a secret: by their names, and by what their heads hold.
//!
//! It catches accidents. What it lists is told to users in `docs/SECURITY.md`, word for word.

use std::path::Path;

use alloy_shared::secret::Token;
use memchr::memmem;

/// This much of a file is looked at: a key is a small file, or near the top of one.
const HEAD: usize = 64 << 10;
/// A marker within a line, with at least this much of a key behind it, is not just talk about keys.
const KEY_MIN: usize = 24;

const NAMES: [&str; 11] = [
    "id_rsa",
    "id_dsa",
    "id_ecdsa",
    "id_ed25519",
    ".netrc",
    "_netrc",
    ".git-credentials",
    ".pgpass",
    ".htpasswd",
    "credentials.json",
    "admin.token",
];
const ENDINGS: [&str; 10] =
    [".p8", ".p12", ".pfx", ".key", ".pem", ".ppk", ".jks", ".keystore", ".keychain", ".keychain-db"];
/// Settings of package managers; most of them hold no secret.
const SETTINGS: [&str; 3] = [".npmrc", ".yarnrc", ".pypirc"];
/// Keys of those settings whose values are secrets.
const SETTING_KEYS: [&str; 4] = ["_authtoken", "_auth", "_password", "password"];

/// Judges a path by its name. Templates of files of environment variables hold no secrets.
pub(super) fn by_name(path: &str) -> Option<&'static str> {
    let path = path.to_ascii_lowercase();
    let name = path.rsplit('/').next().unwrap_or(&path);
    if let Some(rest) = name.strip_prefix(".env") {
        let template = ["example", "sample", "template", "dist"].iter().any(|word| rest.ends_with(word));
        let environment = rest.is_empty() || rest == "rc" || rest.starts_with(['.', '-', '_']);
        if environment && !template {
            return Some("environment variables");
        }
    }
    if ENDINGS.iter().any(|end| name.ends_with(end)) || name.starts_with("id_") && NAMES.contains(&name) {
        return Some("a key");
    }
    let credentials = NAMES.contains(&name) || path == ".aws/credentials" || path.ends_with("/.aws/credentials");
    credentials.then_some("credentials")
}

/// Judges a file by the bytes that it begins with.
pub(super) fn by_content(path: &Path, head: &[u8]) -> Option<&'static str> {
    let head = &head[..head.len().min(HEAD)];
    if holds_private_key(head) {
        return Some("holds a private key");
    }
    if begins_with_token(head) {
        return Some("holds a token of Alloy");
    }
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    (SETTINGS.contains(&name.as_str()) && holds_token(head)).then_some("holds a token")
}

/// The check digits tell a token from talk about one.
fn begins_with_token(head: &[u8]) -> bool {
    let word = head.trim_ascii_start().split(u8::is_ascii_whitespace).next().unwrap_or_default();
    std::str::from_utf8(word).is_ok_and(|word| Token::parse(word).is_ok())
}

fn holds_private_key(head: &[u8]) -> bool {
    memmem::find_iter(head, b"-----BEGIN ").any(|at| {
        let line = &head[at..];
        let line = &line[..line.len().min(80)];
        let Some(end) = memmem::find(line, b"PRIVATE KEY") else { return false };
        // The dashes close on the same line: prose about keys goes on differently.
        let (words, rest) = (&line[..end], &line[end + b"PRIVATE KEY".len()..]);
        let closed = rest.strip_prefix(b" BLOCK").unwrap_or(rest).starts_with(b"-----");
        if !closed || words.contains(&b'\n') {
            return false;
        }
        let begins_line = head[..at].iter().rev().take_while(|byte| **byte != b'\n').all(u8::is_ascii_whitespace);
        begins_line || a_key_follows(&head[at + end..])
    })
}

/// True if base64 comes next, behind the end of the line in whatever form: as it is, or escaped as in JSON.
fn a_key_follows(from_marker: &[u8]) -> bool {
    let Some(dashes) = memmem::find(from_marker, b"-----") else { return false };
    let mut rest = &from_marker[dashes + 5..];
    loop {
        rest = rest.trim_ascii_start();
        match rest.strip_prefix(b"\\n").or_else(|| rest.strip_prefix(b"\\r")) {
            Some(after) => rest = after,
            None => break,
        }
    }
    let base64 = |byte: &&u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    rest.iter().take_while(base64).count() >= KEY_MIN
}

/// True if a line gives a secret key a value that is not taken from a variable.
fn holds_token(head: &[u8]) -> bool {
    String::from_utf8_lossy(head).lines().any(|line| {
        // npm and pip write `key=value` or `key: value`, yarn `"//host/:key" "value"`.
        let blank = ['=', ' ', '\t'];
        let Some((key, value)) = line.trim().split_once(blank) else { return false };
        let key = key.trim_end_matches([':', '"']).to_ascii_lowercase();
        let key = key.rsplit([':', '"']).next().unwrap_or_default();
        let value = value.trim_start_matches(blank);
        let value = value.trim().trim_matches(['"', '\'']);
        SETTING_KEYS.contains(&key) && !value.is_empty() && !value.contains("${")
    })
}

#[cfg(test)]
mod tests {
    use alloy_shared::secret::TokenKind;

    use super::*;

    #[test]
    fn names_of_secrets_are_known_and_their_neighbours_are_not() {
        for (path, secret) in [
            (".env", true),
            ("a/.env.production", true),
            (".env_local", true),
            (".env.example", false),
            (".env.example.pem", true),
            (".envoy.key", true),
            (".envrc", true),
            (".environment", false),
            ("environment.c", false),
            ("ssh/id_ed25519", true),
            ("id_rsa.pub", false),
            ("fastlane/AuthKey_ABC123.p8", true),
            ("Certs/Dist.P12", true),
            ("server.key", true),
            ("server.pem", true),
            ("keyboard.keymap", false),
            ("key", false),
            (".netrc", true),
            (".npmrc", false),
            ("gcp/credentials.json", true),
            ("credentials.swift", false),
            (".aws/credentials", true),
            ("home/.aws/credentials", true),
            ("aws/credentials", false),
            (".git-credentials", true),
            ("release.keystore", true),
            ("farm/admin.token", true),
            ("admin.tokens.swift", false),
        ] {
            assert_eq!(by_name(path).is_some(), secret, "{path}");
        }
    }

    #[test]
    fn a_private_key_is_known_in_a_file_of_any_name() {
        let body = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49";
        let far = format!("{}-----BEGIN PRIVATE KEY-----\n", "x\n".repeat(HEAD));
        for (text, secret) in [
            ("-----BEGIN PRIVATE KEY-----\nabc\n".to_owned(), true),
            ("-----BEGIN OPENSSH PRIVATE KEY-----\r\nabc\r\n".to_owned(), true),
            ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nabc\n".to_owned(), true),
            (
                format!(
                    "-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n-----BEGIN RSA PRIVATE KEY-----\n"
                ),
                true,
            ),
            (format!("key: |\n    -----BEGIN ENCRYPTED PRIVATE KEY-----\n    {body}\n"), true),
            (format!(r#"{{"private_key": "-----BEGIN PRIVATE KEY-----\n{body}\n"}}"#), true),
            (r#"if text.hasPrefix("-----BEGIN PRIVATE KEY-----") { return }"#.to_owned(), false),
            ("-----BEGIN PUBLIC KEY-----\nabc\n".to_owned(), false),
            ("-----BEGIN CERTIFICATE-----\nabc\n".to_owned(), false),
            ("the line -----BEGIN PRIVATE KEY----- starts a key".to_owned(), false),
            (far, false),
        ] {
            assert_eq!(by_content(Path::new("notes.txt"), text.as_bytes()).is_some(), secret, "{:.90}", text);
        }
    }

    #[test]
    fn a_token_in_a_package_managers_settings_is_known() {
        for (name, text, secret) in [
            (".npmrc", "registry=https://npm.example/\n//npm.example/:_authToken=abc\n", true),
            (".npmrc", "//npm.example/:_authToken=${NPM_TOKEN}\n", false),
            (".npmrc", "save-exact=true\n", false),
            (".yarnrc", "\"//npm.example/:_authToken\" \"abc==\"\n", true),
            (".yarnrc", "registry \"https://npm.example\"\n", false),
            (".pypirc", "[pypi]\nusername: me\npassword: abc\n", true),
            (".npmrc", "//npm.example/:_password = \"c2VjcmV0\"\n", true),
            (".pypirc", "[pypi]\nusername = __token__\npassword = abc\n", true),
            (".npmrc.md", "//npm.example/:_authToken=abc\n", false),
        ] {
            assert_eq!(by_content(Path::new(name), text.as_bytes()).is_some(), secret, "{name}: {text}");
        }
    }

    #[test]
    fn a_token_of_alloy_is_known_in_a_file_of_any_name() {
        for kind in TokenKind::ALL {
            let token = Token::mint(kind, [9; 32]);
            let text = token.expose();
            let typo = format!("{}0", &text[..text.len() - 1]);
            for (text, secret) in [
                (text.to_owned(), true),
                (format!("\n {text}\nmore"), true),
                (typo, false),
                (format!("a token looks like {text}"), false),
                (kind.prefix().to_owned(), false),
            ] {
                assert_eq!(by_content(Path::new("notes.txt"), text.as_bytes()).is_some(), secret, "{text}");
            }
        }
    }
}
