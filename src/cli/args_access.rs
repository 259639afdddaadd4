//! How a source is reached, on the command line.
//!
//! Why: what is typed is in every process list and in the shell's history; a secret comes from a
//! file or a variable.
//! How: an option ending in `-file` takes `FILE` or `env:NAME`. `pull` and `run` pass the places on,
//! and they are read when they are used; `create` reads them here, with the caller's rights, and
//! sends the content over the socket, for the daemon may read none of the caller's files.
//! Never: takes a password as an argument.
//! Start at [`AccessArgs`].

use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use clap::Args;

use super::exit::{CliError, Exit};
use crate::fetch::{Access, AccessError, Basic, S3Access, Secret, Trust};

/// Most that is read of a pipe, in bytes.
const MAX_PIPED: u64 = 1 << 20;

/// How the source is reached. FILE may also be `env:NAME`, a variable of the environment.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessArgs {
    /// Name for HTTP basic authentication
    #[arg(long, value_name = "NAME", requires = "password_file")]
    pub user: Option<String>,
    /// File with the password; FILE may also be env:NAME, here and below
    #[arg(long, value_name = "FILE", requires = "user")]
    pub password_file: Option<String>,
    /// File with a bearer token
    #[arg(long, value_name = "FILE", conflicts_with = "user")]
    pub bearer_file: Option<String>,
    /// A header of each request; not for secrets: others see it in process lists
    #[arg(long, value_name = "NAME: VALUE")]
    pub header: Vec<String>,
    /// File with headers, one a line
    #[arg(long, value_name = "FILE")]
    pub header_file: Option<String>,
    /// Certificates (PEM) of authorities to trust besides the system's
    #[arg(long, value_name = "FILE")]
    pub cacert: Option<String>,
    /// The client's certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<String>,
    /// The key of the client's certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<String>,
    /// Proxy to go through [default: of the environment: http_proxy, HTTPS_PROXY, ...]
    #[arg(long, value_name = "URL")]
    pub proxy: Option<String>,
    /// File with the proxy's URL, which may hold a password
    #[arg(long, value_name = "FILE", conflicts_with = "proxy")]
    pub proxy_file: Option<String>,
    /// Hosts, domains and networks to reach without a proxy; * for all
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub no_proxy: Vec<String>,
    /// Server of an s3:// source [default: AWS]
    #[arg(long, value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// Region of an s3:// source [default: us-east-1]
    #[arg(long, value_name = "NAME")]
    pub s3_region: Option<String>,
    /// File with the access key's id [default for run and pull: env:AWS_ACCESS_KEY_ID]
    #[arg(long, value_name = "FILE", requires = "s3_secret_key_file")]
    pub s3_access_key_file: Option<String>,
    /// File with the access key's secret [default for run and pull: env:AWS_SECRET_ACCESS_KEY]
    #[arg(long, value_name = "FILE", requires = "s3_access_key_file")]
    pub s3_secret_key_file: Option<String>,
    /// File with the session token of temporary credentials
    #[arg(long, value_name = "FILE", requires = "s3_access_key_file")]
    pub s3_session_token_file: Option<String>,
    /// Where the bucket is in the URL: in its path (true) or its host (false)
    #[arg(long, value_name = "BOOL")]
    pub s3_path_style: Option<bool>,
}

impl AccessArgs {
    /// For a transfer of this process: places are read when they are used.
    pub(super) fn by_reference(&self) -> Result<Access, CliError> {
        self.access(&|_, place| Ok(place))
    }

    /// For a daemon: places are read now.
    pub(super) fn by_value(&self) -> Result<Access, CliError> {
        self.access(&|what, place| {
            Trust::Person.read(what, &place).map(|text| Secret::text(&text)).map_err(|e| usage(&e))
        })
    }

    fn access(
        &self,
        take: &dyn Fn(&'static str, Secret) -> Result<Secret, CliError>,
    ) -> Result<Access, CliError> {
        let at = |what: &'static str, option: &Option<String>| {
            option.as_deref().map(|text| take(what, place(text)?)).transpose()
        };
        let basic = match (&self.user, at("password", &self.password_file)?) {
            (Some(user), Some(password)) => Some(Basic { user: user.clone(), password }),
            _ => None,
        };
        let proxy = match &self.proxy {
            Some(url) => Some(Secret::text(url)),
            None => at("proxy", &self.proxy_file)?,
        };
        let s3 = S3Access {
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
            access_key: at("S3 access key", &self.s3_access_key_file)?,
            secret_key: at("S3 secret key", &self.s3_secret_key_file)?,
            session_token: at("S3 session token", &self.s3_session_token_file)?,
            path_style: self.s3_path_style,
            ..S3Access::default()
        };
        let access = Access {
            basic,
            bearer: at("bearer token", &self.bearer_file)?,
            headers: self.headers()?,
            ca: at("CA bundle", &self.cacert)?,
            cert: at("client certificate", &self.cert)?,
            key: at("client key", &self.key)?,
            proxy,
            no_proxy: self.no_proxy.clone(),
            s3: (s3 != S3Access::default()).then_some(s3),
            ..Access::default()
        };
        access.check().map_err(|e| usage(&e))?;
        Ok(access)
    }

    /// Headers of the command line and of the file, which wins.
    fn headers(&self) -> Result<std::collections::BTreeMap<String, Secret>, CliError> {
        let file = match &self.header_file {
            Some(text) => {
                Trust::Person.read("headers", &place(text)?).map_err(|error| usage(&error))?
            }
            None => String::new(),
        };
        let lines = file.lines().filter(|line| !line.trim().is_empty());
        let all = self.header.iter().map(String::as_str).chain(lines);
        all.map(|line| {
            let (name, value) = line.split_once(':').ok_or_else(|| {
                CliError::new(Exit::Usage, "a header is no `Name: value`", "write it with a colon")
            })?;
            Ok((name.trim().to_owned(), Secret::text(value.trim())))
        })
        .collect()
    }
}

/// `env:NAME` or a path, made absolute: a daemon in this process has no other directory, but its
/// record outlives this one. A pipe, as of a shell's `<(...)`, can be read only once, and only now.
fn place(text: &str) -> Result<Secret, CliError> {
    if let Some(name) = text.strip_prefix("env:") {
        return Ok(Secret::env(name));
    }
    let failed = |e| CliError::new(Exit::Usage, format!("{text}: {e}"), "give a path");
    let path = std::path::absolute(Path::new(text)).map_err(failed)?;
    let is_pipe = std::fs::metadata(&path).is_ok_and(|meta| meta.file_type().is_fifo());
    if !is_pipe {
        return Ok(Secret::file(&path));
    }
    let mut content = String::new();
    let pipe = std::fs::File::open(&path).map_err(failed)?;
    pipe.take(MAX_PIPED + 1).read_to_string(&mut content).map_err(failed)?;
    if content.len() as u64 > MAX_PIPED {
        return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    Ok(Secret::text(content.trim_end_matches(['\n', '\r'])))
}

fn usage(error: &AccessError) -> CliError {
    CliError::new(Exit::Usage, crate::fetch::one_line(error), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_at_once_only_for_a_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "hunter2\n").unwrap();
        let args =
            AccessArgs { bearer_file: Some(file.display().to_string()), ..AccessArgs::default() };
        let (place, value) = (args.by_reference().unwrap(), args.by_value().unwrap());
        assert_eq!(place.bearer, Some(Secret::file(&file)));
        assert_eq!(value.bearer, Some(Secret::text("hunter2")));
        let none = AccessArgs { bearer_file: Some("env:NO_SUCH".into()), ..args };
        assert!(none.by_value().is_err() && none.by_reference().is_ok());
    }

    #[test]
    fn a_pipe_is_read_at_once_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let args =
            AccessArgs { bearer_file: Some(pipe.display().to_string()), ..AccessArgs::default() };
        for take in [AccessArgs::by_reference, AccessArgs::by_value] {
            let to = pipe.clone();
            let writer = std::thread::spawn(move || std::fs::write(to, "hunter2\n"));
            assert_eq!(take(&args).unwrap().bearer, Some(Secret::text("hunter2")));
            writer.join().unwrap().unwrap();
        }
    }

    #[test]
    fn headers_come_from_arguments_and_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("headers");
        std::fs::write(&file, "X-B: 2\n\nX-C:3\n").unwrap();
        let header_file = Some(file.display().to_string());
        let args = AccessArgs { header: vec!["X-A: 1".into()], header_file, ..Default::default() };
        let access = args.by_reference().unwrap();
        assert_eq!(access.headers.keys().collect::<Vec<_>>(), ["X-A", "X-B", "X-C"]);
        let bad = AccessArgs { header: vec!["hunter2".into()], ..AccessArgs::default() };
        assert!(bad.by_reference().is_err());
    }
}
