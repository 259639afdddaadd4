//! Help, completions and man pages: generated, complete, and what they promise works.

mod control_support;

use std::process::Command;

use control_support::{bedplate, stderr, stdout};

const COMMANDS: [&str; 34] = [
    "run",
    "pull",
    "export",
    "cat",
    "inspect",
    "serve",
    "create",
    "upload",
    "list",
    "ps",
    "top",
    "trace",
    "get",
    "delete",
    "attach",
    "detach",
    "volume",
    "apply",
    "class",
    "pause",
    "resume",
    "cancel",
    "cleanup",
    "set",
    "settings",
    "scrub",
    "node",
    "watch",
    "events",
    "disks",
    "disk",
    "doctor",
    "completions",
    "man",
];

#[test]
fn help_names_every_command_and_every_exit_code() {
    let help = bedplate(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let help = stdout(&help);
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
    }
    for line in ["    0  done", "    2  the command line", "    3  may pass", "  130  a signal"] {
        assert!(help.contains(line), "{line}: {help}");
    }
}

#[test]
fn each_command_has_help_with_examples_and_options_for_scripts() {
    for command in COMMANDS {
        let help = stdout(&bedplate(&[command, "--help"]));
        assert!(help.contains("Examples:") && help.contains("--json"), "{command}: {help}");
        assert!(help.lines().all(|line| line.chars().count() <= 120), "{command}");
    }
}

#[test]
fn every_key_of_the_configuration_is_in_the_help_of_serve_or_a_setting() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("b.toml");
    std::fs::write(&file, "disks = []\nbogus = 1\n").expect("a file");
    let refused = stderr(&bedplate(&["serve", "--config", file.to_str().expect("a path")]));
    let (_, keys) = refused.split_once("expected one of ").expect("the keys");
    let keys: Vec<&str> = keys.split('`').skip(1).step_by(2).collect();
    let help = stdout(&bedplate(&["serve", "--help"]));
    let settings = stdout(&bedplate(&["settings", "set", "--help"]))
        + &stderr(&bedplate(&["settings", "get", "bogus"]));
    assert!(keys.len() > 30, "{keys:?}");
    for key in keys {
        assert!(help.contains(key) || settings.contains(key), "{key}");
    }
}

#[test]
fn no_arguments_is_a_usage_error_with_help_on_stderr() {
    let output = bedplate(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage:") && stdout(&output).is_empty());
}

#[test]
fn the_version_is_the_crates() {
    let version = stdout(&bedplate(&["--version"]));
    assert_eq!(version.trim(), format!("bedplate {}", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_are_made_for_each_shell_and_bash_takes_them() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = stdout(&bedplate(&["completions", shell]));
        for command in COMMANDS {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.bash");
    std::fs::write(&file, stdout(&bedplate(&["completions", "bash"]))).unwrap();
    let check = format!(
        ". {}; COMP_WORDS=(bedplate det); COMP_CWORD=1; _bedplate bedplate det bedplate; \
         echo ${{COMPREPLY[@]}}",
        file.display()
    );
    let output = Command::new("bash").args(["-c", &check]).output().unwrap();
    assert_eq!(stdout(&output).trim(), "detach", "{}", stderr(&output));
}

#[test]
fn man_pages_are_written_for_every_command() {
    let dir = tempfile::tempdir().unwrap();
    assert!(bedplate(&["man", dir.path().to_str().unwrap()]).status.success());
    let mut names = vec!["bedplate.1".to_owned()];
    names.extend(COMMANDS.map(|command| format!("bedplate-{command}.1")));
    for name in names {
        let page = std::fs::read_to_string(dir.path().join(&name)).expect(&name);
        assert!(page.contains(".SH NAME") && page.contains("Examples:"), "{name}");
    }
    assert!(stdout(&bedplate(&["man"])).contains(".TH bedplate 1"));
    // Whatever a page refers to is there.
    for page in std::fs::read_dir(dir.path()).unwrap() {
        let text = std::fs::read_to_string(page.unwrap().path()).unwrap().replace('\\', "");
        for word in text.lines().filter_map(|line| line.strip_suffix("(1)")) {
            assert!(dir.path().join(format!("{word}.1")).exists(), "{word}(1)");
        }
    }
    let nested = std::fs::read_to_string(dir.path().join("bedplate-volume-create.1")).unwrap();
    assert!(nested.contains("Examples:") && nested.contains("replicas"), "{nested}");
}
