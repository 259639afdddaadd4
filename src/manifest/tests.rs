//! Manifests as users write them, parameter for parameter, and as they must not be.

use proptest::prelude::*;

use super::*;

/// The example of Longhorn's page on backing images (1.1.1), as it is there.
const PAGE: &str = r#"apiVersion: v1
kind: ConfigMap
metadata:
  name: longhorn-storageclass
  namespace: longhorn-system
data:
  storageclass.yaml: |
    kind: StorageClass
    apiVersion: storage.k8s.io/v1
    metadata:
      name: longhorn
    provisioner: driver.longhorn.io
    allowVolumeExpansion: true
    reclaimPolicy: Delete
    volumeBindingMode: Immediate
    parameters:
      numberOfReplicas: "3"
      staleReplicaTimeout: "2880"
      fromBackup: ""
      backingImage: "bi-test"
      backingImageURL: "https://backing-image-example.s3-region.amazonaws.com/test-backing-image"
"#;

fn class(parameters: &str) -> String {
    format!(
        "kind: StorageClass\napiVersion: storage.k8s.io/v1\nmetadata:\n  name: longhorn\n\
         parameters:\n{parameters}"
    )
}

fn class_of(text: &str) -> (Class, Vec<String>) {
    let mut documents = read(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(documents.len(), 1);
    let Document { object: Object::Class(class), notes, .. } = documents.remove(0) else {
        panic!()
    };
    (class, notes)
}

fn url(class: &Class) -> &str {
    let Some(ImageSource::Url(url)) = &class.source else { panic!("{class:?}") };
    url.expose().as_str()
}

#[test]
fn the_page_s_example_is_read_parameter_for_parameter() {
    let (class, notes) = class_of(PAGE);
    assert_eq!(class.name.as_str(), "longhorn");
    assert_eq!(class.provisioner, "driver.longhorn.io");
    assert_eq!(class.replicas, Some(3));
    assert_eq!(class.image.as_ref().unwrap().as_str(), "bi-test");
    assert_eq!(
        url(&class),
        "https://backing-image-example.s3-region.amazonaws.com/test-backing-image"
    );
    assert_eq!((class.sha512.as_ref(), class.min_copies), (None, None));
    let kept: Vec<_> = class.kept.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(kept, [("staleReplicaTimeout", "2880")]);
    assert_eq!(notes, [""; 0]);
}

#[test]
fn a_fault_inside_a_config_map_names_its_own_line() {
    let map = |class: &str| {
        let head = "# one\n---\napiVersion: v1\nkind: ConfigMap\ndata:\n";
        format!("{head}  other: x\n  storageclass.yaml: {class}")
    };
    for (class, line, words) in [
        ("|\n    kind: StorageClass\n    a: [\n", 9, "YAML"),
        ("|\n    kind: Pod\n", 8, "Pod"),
        (
            "|-\n    # said\n    ---\n    kind: StorageClass\n    ---\n    kind: Pod\n",
            10,
            "StorageClass",
        ),
        ("\"kind: Pod\\n\"\n", 7, "Pod"),
        ("|\n    kind: ConfigMap\n    apiVersion: v1\n", 8, "ConfigMap"),
    ] {
        let error = read(&map(class)).unwrap_err();
        let text = error.to_string();
        assert_eq!((error.document, error.line), (1, line), "{class:?}: {text}");
        assert!(text.contains(words) || words == "YAML", "{text}");
    }
}

#[test]
fn every_parameter_of_today_is_read_or_said() {
    let text = class(&format!(
        "  numberOfReplicas: \"2\"\n  backingImage: bi-download\n  \
         backingImageDataSourceType: download\n  \
         backingImageDataSourceParameters: '{{\"url\": \"https://h/a?x=1\\u0026y=2\", \"z\": \"1\"}}'\n  \
         backingImageChecksum: {}\n  backingImageMinNumberOfCopies: \"2\"\n  \
         backingImageNodeSelector: \"n\"\n  backingImageDiskSelector: \"d, e\"\n  diskSelector: \"x\"\n  \
         fsType: ext4\n  csi.storage.k8s.io/fstype: ext4\n  colour: blue\n",
        "AB".repeat(64)
    ));
    let (class, notes) = class_of(&text);
    assert_eq!(url(&class), "https://h/a?x=1&y=2", "an escape of JSON is undone");
    assert_eq!(class.sha512, Some("ab".repeat(64)));
    assert_eq!((class.min_copies, class.replicas), (Some(2), Some(2)));
    let kept: Vec<_> = class.kept.keys().map(String::as_str).collect();
    assert_eq!(kept, ["csi.storage.k8s.io/fstype", "diskSelector", "fsType"]);
    for words in [
        "z of the data source is passed over",
        "diskSelector is passed over: replicas are where their image may be",
        "colour is not known, and passed over",
    ] {
        assert!(notes.iter().any(|note| note.contains(words)), "{words}: {notes:?}");
    }
    assert_eq!(notes.len(), 3, "{notes:?}");
    let tags = |texts: &[&str]| crate::names::Tag::parse_all(texts.iter().copied()).unwrap();
    let selectors = Selectors { disk: tags(&["d", "e"]), node: tags(&["n"]) };
    assert_eq!(class.selectors, selectors);
}

#[test]
fn a_class_restores_its_image_from_a_bucket_and_says_where_it_cannot() {
    let restored = |url: &str| {
        class_of(&class(&format!(
            "  backingImage: a\n  backingImageDataSourceType: restore\n  \
             backingImageDataSourceParameters: '{{\"backup-url\": \"{url}\"}}'\n"
        )))
    };
    let backup = "s3://backups@eu-1/?backingImage=parrot";
    let (class, notes) = restored(backup);
    assert_eq!((url(&class), notes.len()), (backup, 0), "{notes:?}");
    let (class, notes) = restored("nfs://server:/path?backingImage=parrot");
    assert!(class.source.is_none() && notes.iter().any(|note| note.contains("has to be known")));
}

#[test]
fn a_class_clones_its_image_and_refuses_what_a_clone_cannot_be() {
    let cloned = |more: &str| {
        class(&format!(
            "  backingImage: a\n  backingImageDataSourceType: clone\n  \
             backingImageDataSourceParameters: '{{{more}}}'\n"
        ))
    };
    let parrot = crate::names::ImageName::parse("parrot").unwrap();
    for more in ["", ", \"encryption\": \"ignore\", \"secret\": \"\""] {
        let (class, notes) = class_of(&cloned(&format!("\"backing-image\": \"parrot\"{more}")));
        assert_eq!(class.source, Some(ImageSource::Clone(parrot.clone())));
        assert!(notes.is_empty(), "{notes:?}");
    }
    let (class, notes) = class_of(&cloned(""));
    assert!(class.source.is_none() && notes.iter().any(|note| note.contains("has to be known")));
    for (more, why) in [
        ("\"backing-image\": \"../x\"", "a-z"),
        ("\"backing-image\": \"parrot\", \"encryption\": \"encrypt\"", "neither encrypted"),
        ("\"backing-image\": \"parrot\", \"secret\": \"hunter2\"", "no secret"),
        ("\"backing-image\": \"parrot\", \"url\": \"http://h/x\"", "only download"),
    ] {
        let error = read(&cloned(more)).unwrap_err().to_string();
        assert!(error.contains(why) && !error.contains("hunter2"), "{more}: {error}");
    }
}

#[test]
fn a_claim_an_image_and_a_volume_are_read_with_their_lines() {
    let text = "# first\n---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata:\n  name: c\n  \
                namespace: vms\nspec:\n  storageClassName: longhorn\n  resources:\n    requests:\n      \
                storage: 1.5Gi\n---\n\n---\napiVersion: longhorn.io/v1beta2\nkind: BackingImage\n\
                metadata: {name: i}\nspec: {sourceType: download, minNumberOfCopies: 2, \
                sourceParameters: {url: 'http://h/i'}}\n--- \n{\"apiVersion\":\"longhorn.io/v1beta2\",\
                \"kind\":\"Volume\",\"metadata\":{\"name\":\"v\"},\"spec\":{\"size\":\"1024\",\
                \"numberOfReplicas\":2,\"backingImage\":\"i\",\"fromBackup\":\"\"}}\n";
    let documents = read(text).unwrap();
    let shown: Vec<_> =
        documents.iter().map(|d| (d.number, d.line, d.object.kind(), d.object.name())).collect();
    assert_eq!(
        shown,
        [
            (1, 3, "PersistentVolumeClaim", "c".to_owned()),
            (2, 16, "BackingImage", "i".to_owned()),
            (3, 21, "Volume", "v".to_owned()),
        ]
    );
    let Object::Claim(claim) = &documents[0].object else { panic!() };
    assert_eq!((claim.namespace.as_str(), claim.size_bytes), ("vms", Some(3 << 29)));
    let Object::Volume(volume) = &documents[2].object else { panic!() };
    assert_eq!((volume.replicas, volume.size_bytes), (Some(2), Some(1024)));
}

#[test]
fn what_is_wrong_is_named_with_document_line_and_field_and_without_the_url() {
    let good = class("  backingImage: a\n");
    let after = |text: &str| format!("{good}---\n{text}");
    let cases: Vec<(String, u64, u64, &str)> = vec![
        (after("kind: Pod\napiVersion: v1\n"), 2, 8, "Pod of \"v1\" is not known"),
        (after("kind: [\n"), 2, 8, "unclosed"),
        (after("a: 1\n\tb: 2\n"), 2, 8, "tab"),
        (after("kind: ConfigMap\napiVersion: v1\ndata: {}\n"), 2, 8, "is not known"),
        (class("  backingImageURL: \"https://hunter2\\&\"\n"), 1, 6, "single quotes"),
        (class("  backingImage: A\n"), 1, 1, "parameters.backingImage: image name \"A\""),
        (
            class("  backingImage: a\n  backingImageURL: 'https://h/a?hunter2\\&b'\n"),
            1,
            1,
            "has a backslash",
        ),
        (class("  backingImage: a\n  backingImageURL: hunter2\n"), 1, 1, "source is not a URL"),
        (
            class("  backingImageURL: https://h/hunter2\n"),
            1,
            1,
            "missing, and there is a source for it",
        ),
        (class("  backingImageDataSourceParameters: 'url: hunter2'\n"), 1, 1, "not a JSON object"),
        (class("  backingImageDataSourceParameters: '{\"url\": 7}'\n"), 1, 1, "give a text"),
        (class("  backingImageChecksum: \"SHA512 checksum\"\n"), 1, 1, "backingImageChecksum"),
        (class("  numberOfReplicas: many\n"), 1, 1, "numberOfReplicas: give 0 to 64"),
        (class("  numberOfReplicas: [3]\n"), 1, 1, "give a text or a number"),
        (class("  fromBackup: s3://hunter2\n"), 1, 1, "bedplate volume restore"),
        (
            "kind: StorageClass\napiVersion: storage.k8s.io/v1\n".to_owned(),
            1,
            1,
            "metadata.name: missing",
        ),
        (String::new(), 1, 1, "empty"),
        ("# nothing\n---\n".to_owned(), 1, 1, "empty"),
        ("---\n".repeat(3) + "7", 1, 4, "is not known"),
    ];
    for (text, document, line, words) in cases {
        let error = read(&text).unwrap_err();
        assert_eq!((error.document, error.line), (document, line), "{error}: {text}");
        let shown = error.to_string();
        assert!(shown.contains(words) && !shown.contains("hunter2"), "{shown}: {text}");
    }
}

#[test]
fn hostile_yaml_is_bounded() {
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for level in 1..12 {
        let before = level - 1;
        let many = vec![format!("*a{before}"); 10].join(",");
        bomb.push_str(&format!("a{level}: &a{level} [{many}]\n"));
    }
    assert!(read(&bomb).is_err());
    assert!(read(&"[".repeat(500_000)).is_err());
    assert!(read(&"- ".repeat(100_000)).is_err());
    let many = "kind: StorageClass\napiVersion: storage.k8s.io/v1\nmetadata: {name: a}\n---\n";
    let error = read(&many.repeat(MAX_DOCUMENTS + 1)).unwrap_err();
    assert_eq!(error.fault, Fault::TooMany { most: MAX_DOCUMENTS });
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(\\PC|\n|---\n|: |- |kind|[&*!%{}\\[\\]'\"|>]){0,60}") {
        drop(read(&text));
        drop(read(&class(&text)));
    }
}

#[test]
fn a_carriage_return_ends_a_line_too() {
    let error = read("kind: X\r\rspec: [\r").unwrap_err();
    assert!((1..=4).contains(&error.line), "line {}: {error}", error.line);
    let error = read("kind: X\rspec: {a: b}}\r").unwrap_err();
    assert!((1..=3).contains(&error.line), "line {}: {error}", error.line);
}

#[test]
fn tags_of_an_image_are_a_list_or_a_text_with_commas() {
    let image = |spec: &str| {
        read(&format!(
            "apiVersion: longhorn.io/v1beta2\nkind: BackingImage\nmetadata: {{name: i}}\n\
             spec: {{sourceParameters: {{url: 'http://h/i'}}, {spec}}}"
        ))
    };
    let selectors = |spec: &str| match image(spec).unwrap().remove(0).object {
        Object::Image(image) => image.selectors,
        other @ (Object::Class(_) | Object::Claim(_) | Object::Volume(_)) => panic!("{other:?}"),
    };
    let tags = |texts: &[&str]| crate::names::Tag::parse_all(texts.iter().copied()).unwrap();
    for (spec, disk, node) in [
        ("diskSelector: [ssd, fast], nodeSelector: []", &["fast", "ssd"][..], &[][..]),
        ("diskSelector: ' ssd,fast,,', nodeSelector: [rack-1]", &["fast", "ssd"], &["rack-1"]),
        ("diskSelector: '', nodeSelector: null", &[], &[]),
    ] {
        let wanted = Selectors { disk: tags(disk), node: tags(node) };
        assert_eq!(selectors(spec), wanted, "{spec}");
    }
    for bad in
        ["diskSelector: [7]", "diskSelector: [a b]", "nodeSelector: {a: b}", "nodeSelector: ['']"]
    {
        let error = image(bad).unwrap_err().to_string();
        assert!(error.contains("Selector"), "{bad}: {error}");
    }
    let many: Vec<String> = (0..65).map(|n| format!("t{n}")).collect();
    assert!(image(&format!("diskSelector: [{}]", many.join(", "))).is_err());
}

#[test]
fn a_clone_is_read_and_what_it_cannot_do_is_refused_with_what_to_do() {
    let image = |spec: &str| {
        read(&format!(
            "apiVersion: longhorn.io/v1beta2\nkind: BackingImage\nmetadata: {{name: i}}\nspec: {spec}"
        ))
    };
    let source = |spec: &str| match image(spec).unwrap().remove(0).object {
        Object::Image(image) => image.source,
        other @ (Object::Class(_) | Object::Claim(_) | Object::Volume(_)) => panic!("{other:?}"),
    };
    let parrot = ImageSource::Clone(crate::names::ImageName::parse("parrot").unwrap());
    for more in ["", ", encryption: ignore", ", encryption: '', secret: '', secret-namespace: ''"] {
        let spec =
            format!("{{sourceType: clone, sourceParameters: {{backing-image: parrot{more}}}}}");
        assert_eq!(source(&spec), parrot, "{spec}");
    }
    let clone = |parameters: &str| {
        format!("{{sourceType: clone, sourceParameters: {{backing-image: parrot, {parameters}}}}}")
    };
    let restore =
        |url: &str| format!("{{sourceType: restore, sourceParameters: {{backup-url: '{url}'}}}}");
    let backup = "s3://backups@eu-1/longhorn/?backingImage=parrot";
    let url = crate::fetch::SourceUrl::parse(backup).unwrap();
    assert_eq!(url.to_string(), backup, "nothing of it is a secret");
    assert_eq!(source(&restore(backup)), ImageSource::Url(url));
    for (spec, field, word) in [
        (clone("encryption: encrypt"), "sourceParameters.encryption", "neither encrypted"),
        (clone("encryption: decrypt"), "sourceParameters.encryption", "neither encrypted"),
        (clone("encryption: rot13"), "sourceParameters.encryption", "give ignore"),
        (clone("secret: hunter2"), "sourceParameters.secret", "no secret"),
        (clone("secret-namespace: hunter2"), "sourceParameters.secret-namespace", "no secret"),
        ("{sourceType: clone}".to_owned(), "sourceParameters.backing-image", "missing"),
        (
            "{sourceType: clone, sourceParameters: {backing-image: ../x}}".to_owned(),
            "sourceParameters.backing-image",
            "a-z",
        ),
        ("{sourceType: export-from-volume}".to_owned(), "sourceType", "--from-nbd"),
        ("{sourceType: upload}".to_owned(), "sourceType", "bedplate upload"),
        ("{sourceType: restore}".to_owned(), "sourceParameters.backup-url", "missing"),
        (restore("nfs://server:/path?backingImage=a"), "sourceType", "by URL"),
        (restore("s3://b@r/?backup=hunter2"), "sourceParameters.backup-url", "BUCKET/KEY"),
        (restore("s3://b:hunter2@r/?backingImage=a"), "backup-url", "BUCKET@REGION"),
        ("{sourceType: wish}".to_owned(), "sourceType", "not known"),
    ] {
        let error = image(&spec).unwrap_err().to_string();
        let said = error.contains(field) && error.contains(word) && !error.contains("hunter2");
        assert!(said, "{spec}: {error}");
    }
}
