//! What a package ships beside the program, made from the same description of the command line:
//! completion scripts and manual pages. Writes only where it is told to.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use vfiod::daemon::Args;

use crate::args::{Cli, Generated};
use crate::output::print;
use crate::trouble::Trouble;

const NAME: &str = "vfioctl";

pub(crate) fn completion(shell: Shell) -> Result<(), Trouble> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    print(&String::from_utf8_lossy(&script))
}

pub(crate) fn files(what: &Generated) -> Result<(), Trouble> {
    match what {
        Generated::Man { directory } => {
            let (users, administrators) = (directory.join("man1"), directory.join("man8"));
            fs::create_dir_all(&users)?;
            fs::create_dir_all(&administrators)?;
            let mut command = Cli::command();
            command.build();
            pages(&command, "1", &users)?;
            pages(&Args::command(), "8", &administrators)?;
        }
        Generated::Completions { directory } => {
            fs::create_dir_all(directory)?;
            for shell in Shell::value_variants() {
                clap_complete::generate_to(*shell, &mut Cli::command(), NAME, directory)?;
            }
        }
    }
    Ok(())
}

/// The page of a command and those of its own commands.
fn pages(command: &clap::Command, section: &str, directory: &Path) -> io::Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        pages(inner, section, directory)?;
    }
    let source = concat!("vfiod ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).section(section).source(source).manual("vfiod");
    let mut file = File::create(directory.join(man.get_filename()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    synopsis(command).to_writer(&mut file)?;
    man.render_description_section(&mut file)?;
    man.render_options_section(&mut file)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut file)?;
    }
    let footer = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    sections(&footer).to_writer(&mut file)
}

/// How a command is typed, with what takes its place more than once; the section of `clap_mangen` has
/// all options instead, without what they take.
fn synopsis(command: &clap::Command) -> Roff {
    let usage = command.clone().render_usage().to_string();
    let mut page = Roff::new();
    page.control("SH", ["SYNOPSIS"]);
    page.control("nf", []);
    for line in usage.trim_start_matches("Usage:").lines() {
        page.text([roman(line.trim())]);
    }
    page.control("fi", []);
    page
}

/// The text below a command's help: a line without indent begins a section, and all others stay
/// as they are, which `clap_mangen` by itself would fill into one paragraph.
fn sections(footer: &str) -> Roff {
    let mut page = Roff::new();
    for line in footer.lines() {
        match line.strip_suffix(':').filter(|_| !line.starts_with(' ')) {
            Some(heading) => {
                page.control("fi", []);
                page.control("SH", [heading.to_uppercase().as_str()]);
                page.control("nf", []);
            }
            None => {
                page.text([roman(line.trim_start())]);
            }
        }
    }
    page.control("fi", []);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_people_see_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        files(&Generated::Man { directory: dir.path().into() }).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        let main = read("man1/vfioctl.1");
        assert!(main.contains(".SH \"EXIT STATUS\"\n"), "{main}");
        assert!(main.contains("\n69  vfiod is not running"), "{main}");
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            assert!(
                read(&format!("man1/vfioctl-{}.1", command.get_name())).contains(".SH SYNOPSIS")
            );
        }
        assert!(!dir.path().join("man1/vfioctl-generate.1").exists());
        let release = read("man1/vfioctl-release.1");
        assert!(release.contains("\nvfioctl release [OPTIONS] <LEASE|DEV|UUID>...\n"), "{release}");
        let daemon = read("man8/vfiod.8");
        assert!(daemon.contains(".TH vfiod 8") && daemon.contains(".SH FILES"), "{daemon}");
    }

    #[test]
    fn every_shell_has_a_script() {
        let dir = tempfile::tempdir().unwrap();
        files(&Generated::Completions { directory: dir.path().into() }).unwrap();
        for name in ["vfioctl.bash", "_vfioctl", "vfioctl.fish"] {
            let script = fs::read_to_string(dir.path().join(name)).unwrap();
            assert!(script.contains("whole-group"), "{name}");
        }
    }
}
