use serde_json::{Value, json};

use super::*;
use crate::tests::keys::{ISSUER, SECRET, Signer, USER, claims};

const NOW_S: i64 = 1_800_000_000;

fn rules() -> Rules {
    Rules::new(ISSUER.into(), Some(&Secret::new(SECRET.into())))
}

fn keys(signers: &[(&str, &Signer)]) -> Vec<PublicKey> {
    let keys: Vec<Value> = signers.iter().map(|(kid, signer)| signer.jwk(kid)).collect();
    published(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
}

fn check_at(token: &str, keys: &[PublicKey], now_s: i64) -> Result<Person, BadJwt> {
    Unverified::parse(token)?.verify(&rules(), keys, Ms(now_s * 1_000))
}

fn check(token: &str, keys: &[PublicKey]) -> Result<Person, BadJwt> {
    check_at(token, keys, NOW_S)
}

#[test]
fn a_person_signs_in_by_each_of_the_three_methods() {
    let (secret, ec, rsa) = (Signer::secret(SECRET), Signer::ec(), Signer::rsa());
    let keys = keys(&[("e1", &ec), ("r1", &rsa)]);
    for (signer, kid) in [(&secret, "old"), (&ec, "e1"), (&rsa, "r1")] {
        let token = signer.sign(kid, &claims(ISSUER, NOW_S));
        let person = Person { user: USER.parse().unwrap(), email: Some("ada@example.com".into()) };
        assert_eq!(check(&token, &keys), Ok(person), "{}", signer.alg());
        let needs = Unverified::parse(&token).map(|token| token.needs().map(str::to_owned)).ok().flatten();
        assert_eq!(needs.is_some(), signer.alg() != "HS256");
        // One bit of each part.
        for (at, part) in token.split('.').enumerate() {
            let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
            let flipped = if part.starts_with('A') { 'B' } else { 'A' };
            parts[at].replace_range(4..5, if part[4..5] == *"A" { "B" } else { "A" });
            assert!(check(&parts.join("."), &keys).is_err(), "{} part {at} {flipped}", signer.alg());
        }
    }
}

#[test]
fn the_key_decides_the_method_and_not_the_token() {
    let (ec, rsa) = (Signer::ec(), Signer::rsa());
    let set = keys(&[("e1", &ec), ("r1", &rsa)]);
    let good = claims(ISSUER, NOW_S);
    let header = |alg: &str, kid: &str| json!({ "alg": alg, "kid": kid });
    for public in [&ec, &rsa] {
        // The classic: an HMAC under the key that everybody knows.
        let forged = Signer::Hmac(public.public()).sign("e1", &good);
        assert_eq!(check(&forged, &set), Err(BadJwt::Signature));
        let pem = Signer::Hmac(public.jwk("e1").to_string().into_bytes()).sign("e1", &good);
        assert_eq!(check(&pem, &set), Err(BadJwt::Signature));
    }
    assert_eq!(check(&ec.sign_as(&header("RS256", "e1"), &good), &set), Err(BadJwt::Method));
    assert_eq!(check(&rsa.sign_as(&header("ES256", "r1"), &good), &set), Err(BadJwt::Method));
    assert_eq!(check(&ec.sign_as(&header("ES256", "r1"), &good), &set), Err(BadJwt::Method));
    assert_eq!(check(&Signer::secret(SECRET).sign_as(&header("ES256", "e1"), &good), &set), Err(BadJwt::Signature));
    assert_eq!(check(&Signer::ec().sign("e1", &good), &set), Err(BadJwt::Signature), "another key of that name");
    let no_secret = Rules::new(ISSUER.into(), None);
    let token = Signer::secret(SECRET).sign("k", &good);
    let token = Unverified::parse(&token).unwrap();
    assert_eq!(token.verify(&no_secret, &set, Ms(NOW_S * 1_000)), Err(BadJwt::Method), "no secret, no HMAC");
}

#[test]
fn what_is_no_signed_token_is_refused_by_its_form() {
    let ec = Signer::ec();
    let set = keys(&[("e1", &ec)]);
    let good = claims(ISSUER, NOW_S);
    let unsigned = |alg: &str| {
        let token = ec.sign_as(&json!({ "alg": alg, "kid": "e1" }), &good);
        format!("{}.", token.rsplit_once('.').unwrap().0)
    };
    for none in ["none", "None", "NONE"] {
        assert_eq!(check(&unsigned(none), &set), Err(BadJwt::Unsigned));
    }
    assert_eq!(check(&unsigned("ES256"), &set), Err(BadJwt::Signature), "an empty signature");
    for alg in ["HS384", "HS512", "ES384", "RS512", "PS256", "EdDSA", "es256", ""] {
        let token = ec.sign_as(&json!({ "alg": alg, "kid": "e1" }), &good);
        assert_eq!(check(&token, &set), Err(BadJwt::Method), "{alg}");
    }
    let critical = ec.sign_as(&json!({ "alg": "ES256", "kid": "e1", "crit": ["b64"], "b64": false }), &good);
    assert_eq!(check(&critical, &set), Err(BadJwt::Critical));
    assert_eq!(check(&ec.sign("e2", &good), &set), Err(BadJwt::UnknownKey));
    assert_eq!(check(&ec.sign_as(&json!({ "alg": "ES256" }), &good), &set), Err(BadJwt::NoKey));
    let token = ec.sign("e1", &good);
    for bad in [
        "",
        ".",
        "..",
        "a.b.c",
        "e30.e30.e30",
        &token[1..],
        &token.replace('.', ""),
        &format!("{token}="),
        &format!("{token}.e30"),
    ] {
        assert_eq!(check(bad, &set).err(), Some(BadJwt::Form), "{bad}");
    }
    assert_eq!(check(&"a.".repeat(5_000), &set), Err(BadJwt::TooLong));
}

#[test]
fn what_a_token_claims_must_hold_now() {
    let secret = Signer::secret(SECRET);
    let told = |name: &str, value: Value, now_s: i64| {
        let mut claims = claims(ISSUER, NOW_S);
        match value {
            Value::Null => claims.as_object_mut().unwrap().remove(name),
            value => claims.as_object_mut().unwrap().insert(name.into(), value),
        };
        check_at(&secret.sign("k", &claims), &[], now_s).err()
    };
    for iss in
        [json!("https://other.test/auth/v1"), json!("https://project.test/auth/v1/"), json!("supabase"), json!(null)]
    {
        assert_eq!(told("iss", iss, NOW_S), Some(BadJwt::Issuer));
    }
    for aud in [json!("anon"), json!(""), json!([]), json!(["anon", "service"]), json!(null)] {
        assert_eq!(told("aud", aud, NOW_S), Some(BadJwt::Audience));
    }
    assert_eq!(told("aud", json!(["x", "authenticated"]), NOW_S), None);
    for sub in [json!("me"), json!(""), json!(null)] {
        assert_eq!(told("sub", sub, NOW_S), Some(BadJwt::Subject));
    }
    assert_eq!(told("exp", json!(null), NOW_S), Some(BadJwt::Expired));
    assert_eq!(told("exp", json!(NOW_S + 1), NOW_S), None);
    assert_eq!(told("exp", json!(NOW_S), NOW_S), Some(BadJwt::Expired));
    assert_eq!(told("exp", json!("tomorrow"), NOW_S), Some(BadJwt::Form));
    for name in ["nbf", "iat"] {
        assert_eq!(told(name, json!(NOW_S + 60), NOW_S), None, "clocks differ");
        assert_eq!(told(name, json!(NOW_S + 61), NOW_S), Some(BadJwt::Future));
    }
    assert_eq!(told("iat", json!(null), NOW_S), None);
    assert_eq!(told("email", json!(null), NOW_S), None);
    // A changed claim is not looked at before the signature is.
    let forged = Signer::secret("another secret that is long enough too").sign("k", &claims("x", 0));
    assert_eq!(check(&forged, &[]), Err(BadJwt::Signature));
}

#[test]
fn of_what_a_service_publishes_only_keys_for_signatures_are_taken() {
    let (ec, rsa) = (Signer::ec(), Signer::rsa());
    let with = |signer: &Signer, name: &str, value: Value| {
        let mut key = signer.jwk("k");
        key[name] = value;
        published(json!({ "keys": [key] }).to_string().as_bytes()).unwrap().len()
    };
    assert_eq!((with(&ec, "alg", Value::Null), with(&rsa, "use", Value::Null)), (1, 1));
    for (signer, name, value) in [
        (&ec, "use", json!("enc")),
        (&ec, "key_ops", json!(["sign"])),
        (&ec, "crv", json!("P-384")),
        (&ec, "alg", json!("HS256")),
        (&ec, "x", json!("AQ")),
        (&ec, "kid", Value::Null),
        (&ec, "kty", json!("RSA")),
        (&rsa, "alg", json!("PS256")),
        (&rsa, "n", json!("?")),
        (&rsa, "kty", json!("oct")),
    ] {
        assert_eq!(with(signer, name, value.clone()), 0, "{name} = {value}");
    }
    assert_eq!(keys(&[("s", &Signer::secret(SECRET))]), []);
    assert_eq!(published(br#"{"keys":[1,"x",{}]}"#).unwrap(), []);
    for bad in ["", "{}", "[]", "<html>"] {
        assert!(published(bad.as_bytes()).is_err(), "{bad}");
    }
}
