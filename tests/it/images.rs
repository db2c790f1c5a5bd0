//! The recipes of the VM images: what a person notices who runs them, found without a Mac.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail, ensure};
use hcl_edit::expr::{Expression, FuncCall, Traversal, TraversalOperator};
use hcl_edit::structure::{Block, Body};
use hcl_edit::template::Element;
use hcl_edit::visit::{Visit, visit_func_call, visit_traversal};

use crate::tidy::scan::{files_below, root};

/// What Packer offers of those that the templates use; `list` makes a type.
const FUNCTIONS: [&str; 5] = ["basename", "dirname", "join", "list", "substr"];

/// All templates of one directory, which Packer reads as one.
struct Templates {
    dir: PathBuf,
    bodies: Vec<Body>,
}

impl Templates {
    fn all() -> Vec<Templates> {
        let mut by_dir: BTreeMap<PathBuf, Vec<Body>> = BTreeMap::new();
        for path in files_below(&root().join("vm-images"), ".pkr.hcl") {
            let text = fs::read_to_string(&path).unwrap();
            let body = text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            by_dir.entry(path.parent().unwrap().to_owned()).or_default().push(body);
        }
        let all: Vec<_> = by_dir.into_iter().map(|(dir, bodies)| Templates { dir, bodies }).collect();
        assert_eq!(all.len(), 2, "a macOS and a Linux image");
        all
    }

    fn blocks(&self, kind: &str) -> Vec<&Block> {
        let of_kind =
            |body| -> Vec<&Block> { Body::blocks(body).filter(|block| block.ident.as_str() == kind).collect() };
        self.bodies.iter().flat_map(of_kind).collect()
    }

    /// Labels of the blocks of a kind: names of variables, sources.
    fn names(&self, kind: &str) -> BTreeSet<String> {
        self.blocks(kind).iter().filter_map(|block| Some(block.labels.last()?.as_str().to_owned())).collect()
    }

    fn locals(&self) -> BTreeMap<String, Expression> {
        let blocks = self.blocks("locals");
        let attributes = blocks.iter().flat_map(|block| block.body.attributes());
        attributes.map(|attribute| (attribute.key.as_str().to_owned(), attribute.value.clone())).collect()
    }

    fn used(&self) -> Used {
        let mut used = Used::default();
        self.bodies.iter().for_each(|body| used.visit_body(body));
        used
    }

    fn provisioners(&self) -> Vec<&Block> {
        let builds = self.blocks("build");
        builds.into_iter().flat_map(|build| build.body.get_blocks("provisioner")).collect()
    }

    /// The scripts of a provisioner, as paths.
    fn scripts(&self, provisioner: &Block) -> Vec<PathBuf> {
        let single = provisioner.body.get_attribute("script").map(|attribute| &attribute.value);
        let several = provisioner.body.get_attribute("scripts").and_then(|attribute| attribute.value.as_array());
        let paths = single.into_iter().chain(several.into_iter().flat_map(|array| array.iter()));
        paths.map(|path| PathBuf::from(self.text(path))).collect()
    }

    /// A string with its `local` and `path` values put in.
    fn text(&self, expression: &Expression) -> String {
        let Expression::StringTemplate(template) = expression else {
            return expression.as_str().expect("a string").to_owned();
        };
        let part = |element: &Element| match element {
            Element::Literal(text) => text.to_string(),
            Element::Interpolation(inner) => match name_of(&inner.expr).as_deref() {
                Some(["path", "root"]) => self.dir.display().to_string(),
                Some(["local", name]) => self.text(&self.locals()[*name]),
                other => panic!("a path with {other:?}"),
            },
            Element::Directive(_) => panic!("a path with a directive"),
        };
        template.iter().map(part).collect()
    }
}

/// `a.b` as its words.
fn name_of(expression: &Expression) -> Option<Vec<&str>> {
    let Expression::Traversal(traversal) = expression else { return None };
    words(traversal)
}

fn words(traversal: &Traversal) -> Option<Vec<&str>> {
    let mut words = vec![traversal.expr.as_variable()?.as_str()];
    for operator in &traversal.operators {
        if let TraversalOperator::GetAttr(name) = operator.value() {
            words.push(name.as_str());
        }
    }
    Some(words)
}

/// Names that the templates use.
#[derive(Default)]
struct Used {
    variables: BTreeSet<String>,
    locals: BTreeSet<String>,
    functions: BTreeSet<String>,
}

impl Visit for Used {
    fn visit_traversal(&mut self, node: &Traversal) {
        match words(node).as_deref() {
            Some(["var", name, ..]) => drop(self.variables.insert((*name).to_owned())),
            Some(["local", name, ..]) => drop(self.locals.insert((*name).to_owned())),
            Some(_) | None => {}
        }
        visit_traversal(self, node);
    }

    fn visit_func_call(&mut self, node: &FuncCall) {
        self.functions.insert(node.name.name.as_str().to_owned());
        visit_func_call(self, node);
    }
}

#[test]
fn every_name_in_a_template_is_declared_once_and_used() {
    for templates in Templates::all() {
        let (used, dir) = (templates.used(), templates.dir.display().to_string());
        let declared = templates.names("variable");
        assert_eq!(templates.blocks("variable").len(), declared.len(), "{dir}: declared twice");
        assert_eq!(used.variables, declared, "{dir}: used and declared variables");
        let locals: BTreeSet<String> = templates.locals().into_keys().collect();
        assert_eq!(used.locals, locals, "{dir}: used and declared locals");
        let known: BTreeSet<String> = FUNCTIONS.map(str::to_owned).into();
        assert!(used.functions.is_subset(&known), "{dir}: {:?}", used.functions);
        for variable in templates.blocks("variable") {
            let has = |key: &str| variable.body.get_attribute(key).is_some();
            assert!(has("description") && has("type") && has("default"), "{dir}: {:?}", variable.labels);
        }
        let sources: Vec<String> = templates
            .blocks("source")
            .iter()
            .map(|block| format!("source.{}.{}", block.labels[0].as_str(), block.labels[1].as_str()))
            .collect();
        let built = templates.blocks("build")[0].body.get_attribute("sources").unwrap().value.as_array().unwrap();
        assert_eq!(built.iter().map(|name| name.as_str().unwrap()).collect::<Vec<_>>(), sources, "{dir}");
    }
}

#[test]
fn the_plugin_is_pinned_and_the_password_is_no_part_of_the_log() {
    for templates in Templates::all() {
        let dir = templates.dir.display().to_string();
        let packer = templates.blocks("packer");
        let plugins = packer.iter().find_map(|block| block.body.get_blocks("required_plugins").next()).unwrap();
        let tart = plugins.body.get_attribute("tart").unwrap().value.as_object().unwrap();
        let value = |wanted: &str| {
            let found = tart.iter().find(|(key, _)| key.as_ident().is_some_and(|key| key.as_str() == wanted));
            found.and_then(|(_, value)| value.expr().as_str()).unwrap_or_default().to_owned()
        };
        assert_eq!(value("source"), "github.com/cirruslabs/tart", "{dir}");
        let version = value("version");
        let exact = version.strip_prefix("= ").is_some_and(|rest| rest.split('.').count() == 3);
        assert!(exact, "{dir}: `{version}` is no exact version");
        let password =
            templates.blocks("variable").into_iter().find(|block| block.labels[0].as_str() == "base_password");
        let sensitive = password.unwrap().body.get_attribute("sensitive").map(|attribute| attribute.value.clone());
        assert_eq!(sensitive.and_then(|value| value.as_bool()), Some(true), "{dir}");
    }
}

#[test]
fn every_script_is_there_can_be_run_and_is_used() {
    let mut used = BTreeSet::new();
    for templates in Templates::all() {
        let provisioners = templates.provisioners();
        for provisioner in &provisioners {
            assert_eq!(provisioner.labels[0].as_str(), "shell");
            let scripts = templates.scripts(provisioner);
            assert!(!scripts.is_empty(), "a provisioner without a script: {:?}", provisioner.labels);
            for script in scripts {
                let script = script.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", script.display()));
                let text = fs::read_to_string(&script).unwrap();
                let shown = script.display();
                assert!(script.metadata().unwrap().permissions().mode() & 0o111 == 0o111, "{shown} cannot be run");
                assert!(text.starts_with("#!/bin/bash\n# "), "{shown} says in its second line what it is for");
                assert!(text.contains("\nset -euo pipefail\n"), "{shown} goes on after a failure");
                check_variables(&text, provisioner, &shown.to_string());
                used.insert(script);
            }
        }
        let last = templates.scripts(provisioners.last().unwrap());
        assert!(last[0].ends_with("rotate-login.sh"), "nothing logs in with the old password afterwards");
    }
    let all: BTreeSet<PathBuf> = files_below(&root().join("vm-images/scripts"), ".sh").into_iter().collect();
    assert_eq!(used, all, "scripts that are used, and that are there");
}

/// What a provisioner gives its script is what the script reads.
fn check_variables(text: &str, provisioner: &Block, shown: &str) {
    let given = provisioner.body.get_attribute("environment_vars").and_then(|attribute| attribute.value.as_array());
    for entry in given.into_iter().flat_map(|array| array.iter()) {
        let Expression::StringTemplate(template) = entry else { panic!("{shown}: a constant variable") };
        let Some(Element::Literal(first)) = template.iter().next() else {
            panic!("{shown}: a variable without a name")
        };
        let name = first.trim_end_matches('=').to_owned();
        assert!(
            text.contains(&format!("${name}")) || text.contains(&format!("${{{name}")),
            "{shown} does not read {name}"
        );
    }
}

#[test]
fn the_page_tells_of_every_image_and_how_to_pin_it() {
    let page = fs::read_to_string(root().join("vm-images/README.md")).unwrap();
    for templates in Templates::all() {
        let name = templates.dir.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(page.contains(&format!("cd vm-images/{name}")), "{name} is not told of");
        for word in page.split("-var ").skip(1) {
            let word = word.trim_start_matches(['"', '\'']);
            let variable: String = word.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            let known = Templates::all().iter().any(|templates| templates.names("variable").contains(&variable));
            assert!(known, "`-var {variable}` is no variable");
        }
    }
    for word in ["packer init", "tart push", "tart fqn", "@sha256:", "Not verified on a Mac"] {
        assert!(page.contains(word), "the page does not say `{word}`");
    }
}

/// Runs a tool if it is there. The gate's own tools must be.
fn tool(name: &str, args: &[&str], dir: &Path, gate: bool) -> Result<Option<Output>> {
    match Command::new(name).args(args).current_dir(dir).output() {
        Ok(out) => Ok(Some(out)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            ensure!(!(gate && std::env::var_os("ALLOY_TEST_GATE").is_some()), "there is no {name}");
            Ok(None)
        }
        Err(error) => bail!("{name}: {error}"),
    }
}

fn must(out: Option<Output>) -> Result<()> {
    if let Some(out) = out {
        let text = [out.stdout, out.stderr].concat();
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&text));
    }
    Ok(())
}

#[test]
fn the_scripts_have_no_known_mistakes() -> Result<()> {
    let scripts: Vec<String> =
        files_below(&root().join("vm-images"), ".sh").iter().map(|path| path.display().to_string()).collect();
    let args: Vec<&str> = scripts.iter().map(String::as_str).collect();
    assert!(args.len() >= 10, "{args:?}");
    must(tool("shellcheck", &args, &root(), true)?)
}

#[test]
fn packer_itself_takes_the_templates_where_it_is() -> Result<()> {
    for templates in Templates::all() {
        // Versions before 1.7 know no plugins.
        let Some(version) = tool("packer", &["version"], &templates.dir, false)? else { return Ok(()) };
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        if ["v1.5.", "v1.6."].iter().any(|old| version.contains(old)) {
            return Ok(());
        }
        must(tool("packer", &["fmt", "-check", "-diff", "."], &templates.dir, false)?)?;
        must(tool("packer", &["validate", "-syntax-only", "."], &templates.dir, false)?)?;
    }
    Ok(())
}

/// A guest in a directory: its commands write down their arguments. `sudo` runs what follows it.
struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    fn new(commands: &[(&str, &str)]) -> Result<Guest> {
        let guest = Guest { dir: tempfile::tempdir()? };
        for name in ["bin", "home", "sshd"] {
            fs::create_dir(guest.at(name))?;
        }
        for (name, then) in commands {
            let log = guest.at("calls").display().to_string();
            let script = format!("#!/bin/bash\nprintf '%s\\n' \"{name} $*\" >>'{log}'\n{then}\n");
            let path = guest.at("bin").join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(guest)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, script: &str, variables: &[(&str, &str)]) -> Result<Output> {
        let path = std::env::var("PATH")?;
        let mut command = Command::new(root().join("vm-images/scripts").join(script));
        command.env_clear().env("PATH", format!("{}:{path}", self.at("bin").display())).env("HOME", self.at("home"));
        command.env("KCPASSWORD", self.at("kcpassword")).env("SSHD_CONFIG_DIR", self.at("sshd"));
        command.env("MACHINE_ID", self.at("machine-id")).envs(variables.iter().copied());
        command.output().context("the script starts")
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.at("calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

/// As macOS hides it: by a constant, padded with zeros.
fn unmask(bytes: &[u8]) -> String {
    const MASK: [u8; 11] = [0x7d, 0x89, 0x52, 0x23, 0xd2, 0xbc, 0xdd, 0xea, 0xa3, 0xb9, 0x1f];
    let plain: Vec<u8> = bytes.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    assert!(plain.len().is_multiple_of(12) && plain.last() == Some(&0), "{plain:?}");
    String::from_utf8(plain).unwrap().trim_end_matches('\0').to_owned()
}

/// `dscl . -authonly` takes any password but the old one.
const MAC: [(&str, &str); 6] = [
    ("sudo", "exec \"$@\""),
    ("security", ""),
    ("dscl", "[ \"$2 $4\" != '-authonly admin' ]"),
    ("chown", ""),
    ("defaults", ""),
    ("launchctl", ""),
];

#[test]
fn after_the_rotation_one_new_password_opens_account_keychain_and_login() -> Result<()> {
    let guest = Guest::new(&MAC)?;
    let variables = [("OLD_PASSWORD", "admin"), ("SSH_PUBLIC_KEY", "ssh-ed25519 AAAA farm")];
    let out = guest.run("macos/rotate-login.sh", &variables)?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let new = unmask(&fs::read(guest.at("kcpassword"))?);
    assert_eq!(new.len(), 48, "{new}");
    let calls = guest.calls();
    let at =
        |what: &str| calls.iter().position(|call| call.contains(what)).unwrap_or_else(|| panic!("{what}: {calls:#?}"));
    let keychain = at(&format!("security set-keychain-password -o admin -p {new} "));
    let account = at(&format!("admin {new}"));
    assert!(keychain < account || calls[account].starts_with("security"), "the keychain goes first: {calls:#?}");
    at(" -passwd /Users/");
    assert_eq!(fs::metadata(guest.at("kcpassword"))?.permissions().mode() & 0o777, 0o600);
    let keys = fs::read_to_string(guest.at("home/.ssh/authorized_keys"))?;
    assert_eq!(keys, "ssh-ed25519 AAAA farm\n");
    let sshd = fs::read_to_string(guest.at("sshd/010-alloy.conf"))?;
    assert!(sshd.contains("PasswordAuthentication no"), "{sshd}");
    assert!(!calls.iter().any(|call| call.contains("openssh")), "SSH stays on for the key");
    let talk = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(!talk.contains(&new), "the password is shown: {talk}");
    Ok(())
}

#[test]
fn without_a_key_ssh_is_off_and_an_old_password_that_still_works_fails_the_build() -> Result<()> {
    let guest = Guest::new(&MAC)?;
    let variables = [("OLD_PASSWORD", "admin"), ("SSH_PUBLIC_KEY", "")];
    assert!(guest.run("macos/rotate-login.sh", &variables)?.status.success());
    assert!(guest.calls().contains(&"launchctl disable system/com.openssh.sshd".to_owned()), "{:#?}", guest.calls());
    assert!(!guest.at("home/.ssh").exists());
    let mut takes_all = MAC;
    takes_all[2] = ("dscl", "");
    let guest = Guest::new(&takes_all)?;
    let out = guest.run("macos/rotate-login.sh", &variables)?;
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("still opens"));
    Ok(())
}

#[test]
fn a_linux_guest_has_no_password_and_clones_have_their_own_identity() -> Result<()> {
    let guest = Guest::new(&[("sudo", "exec \"$@\""), ("usermod", ""), ("systemctl", "")])?;
    fs::write(guest.at("machine-id"), "0123\n")?;
    let out = guest.run("linux/rotate-login.sh", &[("SSH_PUBLIC_KEY", "")])?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(guest.calls().iter().any(|call| call.starts_with("usermod --password * ")), "{:#?}", guest.calls());
    assert!(guest.calls().contains(&"systemctl disable ssh.service".to_owned()));
    assert_eq!(fs::read(guest.at("machine-id"))?, b"");
    Ok(())
}

#[test]
fn every_runtime_is_booted_once_and_shut_down() -> Result<()> {
    let list = r#"{"devices":{"iOS-26-1":[{"udid":"A"},{"udid":"B"}],"watchOS-26-1":[{"udid":"C"}],"tvOS":[]}}"#;
    let answer = format!("case \"$*\" in *--json) echo '{list}';; esac");
    let guest = Guest::new(&[("xcrun", &answer)])?;
    let out = guest.run("macos/simulators.sh", &[])?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let want =
        ["bootstatus A -b", "shutdown A", "bootstatus C -b", "shutdown C"].map(|rest| format!("xcrun simctl {rest}"));
    assert_eq!(guest.calls()[1..], want);
    let guest = Guest::new(&[("xcrun", "echo '{\"devices\":{}}'")])?;
    assert!(!guest.run("macos/simulators.sh", &[])?.status.success(), "an image without a simulator");
    Ok(())
}
