//! Recovery plans, as an operator runs them on the machine that takes over: two volumes in two
//! groups, with scripts and a manual step. What was done is seen at what the scripts wrote down, in
//! the journal, and at the generations in the store.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::inline::{protect_as, qemu_io};
use crate::stage::{Daemon, LoopDevice, MIB, Place, Reply, path_with_qemu, replica, until};

/// Both sides, and a plan at the second one.
struct Site {
    place: Place,
    /// Of the volumes, where they are protected.
    first: Daemon,
    uris: [String; 2],
    _disks: [LoopDevice; 2],
    /// Where the plan is run.
    second: Daemon,
    store: PathBuf,
    plan: PathBuf,
}

const NAMES: [&str; 2] = ["db", "web"];

impl Site {
    fn new() -> Self {
        let place = Place::new();
        let store = place.folder("store");
        let first = Daemon::start(&place);
        let disks = NAMES.map(|name| LoopDevice::of_its_own(&place, name, 8 * MIB));
        let uris = [0, 1].map(|n| {
            let every = ["--every", "1h"];
            let uri = protect_as(NAMES[n], &first, &disks[n], &store, &every);
            qemu_io(&uri, &[&format!("write -P {} 0 4M", n + 1)]);
            first.point(NAMES[n], &[]);
            uri
        });
        let at = |name: &str| place.at(&format!("second.{name}"));
        let second = Daemon::start_with(&place.folder("second"), &at("sock"), &at("log"));
        let site = Self {
            plan: place.at("shop.toml"),
            place,
            first,
            uris,
            _disks: disks,
            second,
            store,
        };
        site.write_script();
        fs::write(&site.plan, site.text()).unwrap();
        site
    }

    /// A script that notes what it was run for, waits while it is told to, and fails if it is told to.
    fn write_script(&self) {
        let (noted, here) = (self.noted_path(), self.place.path().display());
        let text = format!(
            "#!/bin/sh\n\
             say() {{ echo \"$1 $REPLICA_STEP $REPLICA_PLAN $REPLICA_MODE $REPLICA_GROUP\" >> {}; }}\n\
             say begun\n\
             while [ -e {here}/hang.$1 ]; do sleep 0.05; done\n\
             echo \"$1 says so\"\n\
             if [ -e {here}/fail.$1 ]; then exit 3; fi\n\
             say ended\n",
            noted.display()
        );
        fs::write(self.script(), text).unwrap();
        fs::set_permissions(self.script(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn script(&self) -> PathBuf {
        self.place.at("note.sh")
    }

    fn noted_path(&self) -> PathBuf {
        self.place.at("noted")
    }

    fn text(&self) -> String {
        let (script, store) = (self.script(), self.store.display().to_string());
        let script = script.display();
        let here = self.place.path().display();
        format!(
            r#"
            name = "shop"
            [[group]]
            name = "data"
            before = [{{ name = "announce", run = ["{script}", "announce"] }}]
            after = [{{ name = "warm", run = ["{script}", "warm"], timeout = "1m" }}]
            [[group.volume]]
            volume = "db"
            store = "{store}"
            nbd = "unix:{here}/db.nbd"
            [[group]]
            name = "front"
            before = [{{ name = "dns", confirm = "the name leads here" }}]
            after = [{{ name = "tell", run = ["{script}", "tell"] }}]
            [[group.volume]]
            volume = "web"
            store = "file://{store}"
            point = "latest-processed"
            nbd = "unix:{here}/web.nbd"
            "#
        )
    }

    fn args<'a>(&'a self, way: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let plan = self.plan.to_str().unwrap();
        [&["plan", "run", plan, way, "--json"][..], more].concat()
    }

    fn run(&self, way: &str, more: &[&str]) -> Reply {
        self.second.replica(&self.args(way, more))
    }

    /// A run in the background.
    fn start(&self, way: &str, more: &[&str]) -> Child {
        let mut command = self.second.command(&self.args(way, more));
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }

    fn noted(&self) -> Vec<String> {
        let text = fs::read_to_string(self.noted_path()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn journal(&self) -> Vec<Value> {
        let path = self.place.at("shop.toml.journal");
        let text = fs::read_to_string(path).unwrap_or_default();
        let whole = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn events(&self, event: &str) -> Vec<String> {
        let journal = self.journal();
        let those = journal.iter().filter(|entry| entry["event"] == event);
        those
            .map(|entry| entry["step"].as_str().unwrap().to_owned())
            .collect()
    }

    fn catalogue(&self, volume: &str) -> Value {
        let store = self.store.to_str().unwrap();
        self.second.replica(&["adopt", store]).ok();
        let status = self.second.replica(&["status", volume, "--json"]).json();
        status["adopted"][0].clone()
    }

    fn uri(&self, volume: &str) -> String {
        let socket = self.place.at(&format!("{volume}.nbd"));
        format!("nbd+unix:///?socket={}", socket.display())
    }

    #[track_caller]
    fn assert_failed_over_once(&self) {
        for (n, volume) in NAMES.iter().enumerate() {
            let adopted = self.catalogue(volume);
            assert_eq!(
                (&adopted["state"], &adopted["generation"]),
                (&json!("failed_over"), &json!(2)),
                "{adopted}"
            );
            qemu_io(&self.uri(volume), &[&format!("read -P {} 0 4M", n + 1)]);
        }
        let mut done = self.events("done");
        assert_eq!(done, STEPS);
        done.dedup();
        assert_eq!(done.len(), STEPS.len());
    }

    /// Nothing is open, and the volumes replicate as before.
    #[track_caller]
    fn assert_nothing_left(&self) {
        let status = self.second.replica(&["status", "--json"]).json();
        assert_eq!(status["open"], json!([]), "{status}");
        for volume in NAMES {
            assert_eq!(self.catalogue(volume)["state"], "replicating");
            let listed = self.second.replica(&["points", volume, "--json"]).json();
            assert_eq!(listed["branches"], json!([]), "{listed}");
            assert!(!self.place.at(&format!("{volume}.nbd")).exists());
        }
    }
}

const STEPS: [&str; 6] = [
    "data/before/announce",
    "data/volume/db",
    "data/after/warm",
    "front/before/dns",
    "front/volume/web",
    "front/after/tell",
];

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn killed_inside_a_script_it_goes_on_there() {
    let site = Site::new();
    let hang = site.place.at("hang.warm");
    fs::write(&hang, "").unwrap();
    let child = site.start("--unplanned", &[]);
    until("the second script runs", Duration::from_secs(60), || {
        let begun = "begun warm shop unplanned data";
        site.noted().iter().any(|line| line == begun).then_some(())
    });
    // Two at once do nothing.
    site.run("--unplanned", &[]).fails(1, &["another run"]);
    kill(child);
    qemu_io(&site.uri("db"), &["write -P 7 4M 1M", "flush"]);
    fs::remove_file(&hang).unwrap();

    let stopped = site.run("--unplanned", &[]);
    stopped.fails(4, &["the name leads here", "--confirm dns"]);
    let told: Value = serde_json::from_str(&stopped.stdout).unwrap();
    assert_eq!(
        (&told["state"], &told["step"]),
        (&json!("waiting"), &json!("dns"))
    );
    site.run("--unplanned", &["--confirm", "dms"])
        .fails(2, &["dms"]);
    let told = site.run("--unplanned", &["--confirm", "dns"]).json();
    assert_eq!(told["state"], "completed");
    let db = &told["steps"][1];
    assert_eq!(
        (&db["outcome"], &db["loss_bytes"]),
        (&json!("failed_over"), &json!(0)),
        "{told}"
    );
    site.assert_failed_over_once();
    // What was written in between is there: it was not failed over again.
    qemu_io(&site.uri("db"), &["read -P 7 4M 1M"]);
    let noted = site.noted();
    let ended: Vec<_> = noted
        .iter()
        .filter(|line| line.starts_with("ended"))
        .collect();
    assert_eq!(
        ended,
        [
            "ended announce shop unplanned data",
            "ended warm shop unplanned data",
            "ended tell shop unplanned front"
        ]
    );
    assert_eq!(
        noted.len(),
        7,
        "the one that was cut short began twice: {noted:?}"
    );

    let again = site.run("--unplanned", &[]);
    assert_eq!(again.json()["state"], "completed");
    assert!(again.stderr.contains("done already"), "{again:?}");
    assert_eq!(site.noted(), noted);
    site.run("--planned", &[])
        .fails(1, &["in use here", "nothing was done"]);
}

#[test]
fn killed_between_any_two_lines_each_thing_is_done_once() {
    let site = Site::new();
    let limit = Duration::from_secs(60);
    for lines in 1..=2 * STEPS.len() {
        let mut child = site.start("--unplanned", &["--confirm", "dns"]);
        until("a line more", limit, || {
            let is_there = site.journal().len() >= lines;
            (is_there || child.try_wait().unwrap().is_some()).then_some(())
        });
        kill(child);
    }
    let told = site.run("--unplanned", &["--confirm", "dns"]).json();
    assert_eq!(told["state"], "completed");
    site.assert_failed_over_once();
}

#[test]
fn a_planned_run_loses_nothing() {
    let mut site = Site::new();
    for (n, uri) in site.uris.iter().enumerate() {
        qemu_io(uri, &[&format!("write -P {} 6M 1M", n + 5)]);
    }
    site.run("--planned", &["--confirm", "dns"]).ok();
    for (n, volume) in NAMES.iter().enumerate() {
        qemu_io(&site.uri(volume), &[&format!("read -P {} 6M 1M", n + 5)]);
        site.first
            .until("it is fenced", volume, |v| v["state"] == "failed_over");
    }
    site.assert_failed_over_once();
    site.first.terminate();
}

#[test]
fn a_test_leaves_nothing() {
    let site = Site::new();
    let hang = site.place.at("hang.tell");
    fs::write(&hang, "").unwrap();
    let child = site.start("--test", &["--confirm", "dns"]);
    until("the last script runs", Duration::from_secs(60), || {
        let begun = "begun tell shop test front";
        site.noted().iter().any(|line| line == begun).then_some(())
    });
    // Both are there to be looked at, and replication goes on.
    qemu_io(&site.uri("db"), &["read -P 1 0 4M", "write -P 9 0 1M"]);
    qemu_io(&site.uri("web"), &["read -P 2 0 4M"]);
    qemu_io(&site.uris[0], &["write -P 3 7M 1M"]);
    site.first.point("db", &[]);
    kill(child);
    site.run("--unplanned", &[])
        .fails(1, &["--test is not over", "replica plan cleanup"]);
    fs::remove_file(&hang).unwrap();
    let told = site.run("--test", &[]).json();
    assert_eq!(told["state"], "completed");
    site.assert_nothing_left();

    // The next one is a new one; this one is given up.
    site.run("--test", &[]).fails(4, &["--confirm dns"]);
    qemu_io(&site.uri("db"), &["read -P 3 7M 1M"]);
    let plan = site.plan.to_str().unwrap();
    site.second.replica(&["plan", "cleanup", plan]).ok();
    site.assert_nothing_left();
    let again = site.second.replica(&["plan", "cleanup", plan]);
    again.ok();
    assert!(again.stderr.contains("nothing"), "{again:?}");
    // And nothing is in the way of the real one.
    site.run("--unplanned", &["--confirm", "dns"]).ok();
    site.assert_failed_over_once();
}

#[test]
fn a_script_that_fails_stops_the_plan() {
    let site = Site::new();
    let fail = site.place.at("fail.announce");
    fs::write(&fail, "").unwrap();
    let words = ["announce says so", "exit status: 3", "--confirm announce"];
    site.run("--unplanned", &[]).fails(1, &words);
    assert_eq!(site.catalogue("db")["state"], "replicating");
    let failed = site.journal().pop().unwrap();
    assert_eq!(
        (&failed["event"], &failed["step"]),
        (&json!("failed"), &json!("data/before/announce"))
    );
    site.run("--unplanned", &[]).fails(1, &words);
    // Another plan does not go on where this one is.
    fs::write(&site.plan, site.text().replace("the name", "that name")).unwrap();
    site.run("--unplanned", &[])
        .fails(1, &["digest", "as it was", "--journal"]);
    fs::write(&site.plan, site.text()).unwrap();
    site.run("--unplanned", &["--confirm", "warm"])
        .fails(2, &["not run yet"]);
    let confirmed = ["--confirm", "announce", "--confirm", "dns"];
    site.run("--unplanned", &confirmed).ok();
    site.assert_failed_over_once();

    // A new run would find the volumes in use.
    fs::write(&site.plan, site.text().replace("the name", "that name")).unwrap();
    site.run("--unplanned", &[])
        .fails(1, &["in use here", "nothing was done"]);
}

#[test]
fn what_is_wrong_is_found_before_anything_is_done() {
    let site = Site::new();
    let plan = site.plan.to_str().unwrap().to_owned();
    let check = |text: &str| {
        fs::write(&site.plan, text).unwrap();
        site.second.replica(&["plan", "check", &plan])
    };
    let text = site.text();
    check(&text).ok();
    check(&text.replace("timeout", "timout")).fails(1, &["timout"]);
    check(&text.replace("\"warm\"", "\"announce\"")).fails(1, &["announce", "twice"]);
    let missing = text
        .replace("note.sh", "none.sh")
        .replace("volume = \"web\"", "volume = \"wob\"");
    check(&missing).fails(1, &["script announce", "none.sh", "volume wob"]);
    site.run("--unplanned", &[])
        .fails(1, &["none.sh", "volume wob", "nothing was done"]);
    let elsewhere = text.replace("file://", "file:///nowhere");
    check(&elsewhere).fails(1, &["volume web", "/nowhere"]);
    let keyed = text.replace("point = ", "key_file = \"/dev/null\"\n point = ");
    check(&keyed).fails(1, &["volume web", "key"]);

    // One that asks for what is not there, a socket that is taken, and no daemon.
    let application = text.replace("latest-processed", "latest-application");
    check(&application).fails(1, &["volume web", "application-consistent"]);
    fs::write(&site.plan, &text).unwrap();
    let nbd = format!("unix:{}", site.place.at("web.nbd").display());
    let store = site.store.to_str().unwrap();
    let open = ["open", "db", "--store", store, "--point", "latest"];
    site.second
        .replica(&[&open[..], &["--nbd", &nbd]].concat())
        .ok();
    site.run("--unplanned", &[])
        .fails(1, &["volume web", "web.nbd", "nothing was done"]);
    let none = ["--socket", "/nonexistent/s"];
    replica(&[&site.args("--unplanned", &[])[..], &none].concat()).fails(1, &["replica run"]);
    assert_eq!(site.journal(), [] as [Value; 0]);
    assert_eq!(site.noted(), [] as [String; 0]);
    assert_eq!(site.catalogue("db")["state"], "replicating");
}

/// The first sector of a disk that says so on the serial console when it is booted.
fn boot_sector() -> [u8; 512] {
    let code = [
        0x31, 0xc0, 0x8e, 0xd8, // ax and ds are zero
        0xbe, 0x16, 0x7c, 0xfc, // si at the text, upwards
        0xac, 0x84, 0xc0, 0x74, 0x06, // the next byte; zero ends it
        0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // to the port, and on
        0xf4, 0xeb, 0xfd, // halt
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[code.len()..][..11].copy_from_slice(b"is alive!\r\n");
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

const MACHINE: &str = r#"
    name = "front"
    memory = "64M"
    timeout = "2m"
    life = { console = "is alive!" }
"#;

fn with_a_machine() -> Site {
    let site = Site::new();
    let sector = site.place.at("sector");
    fs::write(&sector, boot_sector()).unwrap();
    qemu_io(
        &site.uris[1],
        &[&format!("write -s {} 0 512", sector.display())],
    );
    site.first.point("web", &[]);
    let machine = "[[group.machine]]\nvolume = \"web\"\n";
    fs::write(&site.plan, site.text() + machine).unwrap();
    site
}

/// Runs the plan where QEMU is found.
fn run_with_qemu(site: &Site, way: &str) -> (i32, String) {
    let mut command = site
        .second
        .command(&site.args(way, &["--confirm", "dns", "--accelerator", "tcg"]));
    let output = command.env("PATH", path_with_qemu()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + &text(&output.stderr);
    (output.status.code().unwrap(), said)
}

fn define(site: &Site, text: &str) {
    let (file, store) = (site.place.at("machine.toml"), site.store.to_str().unwrap());
    fs::write(&file, text).unwrap();
    let args = ["machine", "set", "web", file.to_str().unwrap()];
    site.second
        .replica(&[&args[..], &["--store", store]].concat())
        .ok();
}

fn checked(site: &Site) -> Reply {
    let plan: &Path = &site.plan;
    site.second
        .replica(&["plan", "check", plan.to_str().unwrap()])
}

#[test]
fn a_test_drills_the_machines() {
    let site = with_a_machine();
    checked(&site).fails(1, &["machine web", "replica machine set"]);
    define(&site, &MACHINE.replace("is alive!", "never"));
    define(&site, &MACHINE.replace("life", "# life"));
    checked(&site).fails(1, &["machine web", "life"]);
    define(
        &site,
        &MACHINE.replace("is alive!", "never").replace("2m", "3s"),
    );
    checked(&site).ok();
    let (code, said) = run_with_qemu(&site, "--test");
    assert!(code == 1 && said.contains("silent"), "{said}");
    define(&site, MACHINE);
    let (code, said) = run_with_qemu(&site, "--test");
    assert!(code == 0 && said.contains("alive after"), "{said}");
    site.assert_nothing_left();
    let listed = site.second.replica(&["points", "web", "--json"]).json();
    let newest = listed["points"].as_array().unwrap().last().unwrap();
    assert_eq!(newest["proven"]["verdict"], "alive", "{listed}");
}

/// The process that a machine in use runs in; ended at the end.
struct Machine(i32);

impl Machine {
    fn of(site: &Site) -> Self {
        let pid = fs::read_to_string(site.place.at("web.nbd.machine/pid")).unwrap();
        Self(pid.trim().parse().unwrap())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        use nix::sys::signal::{Signal, kill};
        let _ = kill(nix::unistd::Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

#[test]
fn in_earnest_the_machines_stay() {
    let site = with_a_machine();
    define(
        &site,
        &MACHINE.replace("is alive!", "never").replace("2m", "2s"),
    );
    let (code, said) = run_with_qemu(&site, "--unplanned");
    let machine = Machine::of(&site);
    assert!(code == 1 && said.contains("silent"), "{said}");
    // It goes on, and is not started twice.
    let (code, said) = run_with_qemu(&site, "--unplanned");
    assert!(code == 0 && said.contains("it runs"), "{said}");
    assert_eq!(Machine::of(&site).0, machine.0);
}

/// Planned; the source's last write did not cover its block.
#[test]
fn in_earnest_the_sign_of_life_is_waited_for() {
    let site = with_a_machine();
    define(&site, MACHINE);
    let (code, said) = run_with_qemu(&site, "--planned");
    assert!(code == 0 && said.contains("sign of life"), "{said}");
    let machine = Machine::of(&site);
    assert!(Path::new(&format!("/proc/{}", machine.0)).exists());
}
