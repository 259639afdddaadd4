//! Texts that arrive at the control socket, in URLs, and in headers of HTTP answers.
#![no_main]

use bedplate::control::types::{CreateAttachment, CreateImage, FetchImage};
use bedplate::fetch::{
    Access, AddressClass, AddressPolicy, Expect, SourceUrl, judge_address, parse_content_range,
};
use bedplate::names::ImageName;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = serde_json::from_slice::<CreateImage>(bytes) {
        let (access, checked) = (&image.access, image.access.check());
        // What is kept comes back the same, and what is shown are words of ours.
        let kept = serde_json::to_vec(access).expect("an access has a JSON form");
        assert_eq!(&serde_json::from_slice::<Access>(&kept).expect("its own JSON"), access);
        assert!(checked.is_err() || access.kinds().len() <= 9);
    }
    let _ = serde_json::from_slice::<CreateAttachment>(bytes);
    let _ = serde_json::from_slice::<FetchImage>(bytes);
    if let Ok(octets) = <[u8; 16]>::try_from(bytes) {
        let address = std::net::IpAddr::from(octets);
        let public = matches!(judge_address(address), AddressClass::Public | AddressClass::Private);
        assert_eq!(AddressPolicy::daemon().allows(address), public);
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some((start, end, total)) = parse_content_range(text) {
        assert!(start < end && total.is_none_or(|total| end <= total));
    }
    if let Ok(name) = ImageName::parse(text) {
        assert!(!name.as_str().contains(['/', '.', '\0']));
    }
    if let Some(name) = ImageName::suggest(text) {
        assert_eq!(ImageName::parse(name.as_str()), Ok(name));
    }
    if let Ok(url) = SourceUrl::parse(text) {
        let whole = url.expose();
        let _ = AddressPolicy::daemon().judge_url(whole);
        let shown = url.to_string();
        if let Some(password) = whole.password().filter(|word| word.len() > 8) {
            assert!(
                !shown.contains(password)
                    || whole.path().contains(password)
                    || whole.host_str().is_some_and(|host| host.contains(password))
                    || whole.query().is_some_and(|query| query.contains(password))
            );
        }
    }
    let _ = Expect::parse(Some(text), Some(text));
});
