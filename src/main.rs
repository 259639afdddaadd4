//! Arguments in, exit code out.

fn main() -> std::process::ExitCode {
    bedplate::cli::main()
}
