#!/bin/bash
# The main job, end to end, on a loop device: a disk in use, with a filesystem and a
# database on it, is protected without unmounting it; half of what it holds is deleted;
# the point before the loss comes back from the store alone, when the disk and the agent
# are gone; fsck, SQLite and checksums judge what came back. As root.
#
#   REPLICA_BIN     the binary to run; default target/release/replica
#   REPLICA_TMP     where the 1 GiB disk and the store live meanwhile; default /var/tmp
#
# It touches nothing but its own folder, loop devices, mounts and processes, and removes
# them when it ends, however it ends.
set -euo pipefail
cd "$(dirname "$0")/.."

replica=$(realpath "${REPLICA_BIN:-target/release/replica}")
[ "$(id -u)" -eq 0 ] || { echo "quickstart makes a loop device: run it as root" >&2; exit 1; }
[ -x "$replica" ] || { echo "$replica is missing: make build" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin

place=$(mktemp -d "${REPLICA_TMP:-/var/tmp}/replica-quickstart.XXXXXX")
export REPLICA_STATE_DIR=$place/state REPLICA_SOCKET=$place/agent.sock
disk=$place/disk.img mount=$place/mnt store=$place/store restored=$place/restored.img
mkdir -p "$REPLICA_STATE_DIR" "$mount" "$store"

daemon= writer= loop= restored_loop= volume=

say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }
fact() { printf '        %s\n' "$*"; }

# Ends a process of ours: asks first, insists after ten seconds.
end() {
  [ -n "$1" ] || return 0
  kill -TERM "$1" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

clean_up() {
  status=$?
  trap - EXIT INT TERM
  set +e
  if [ "$status" -ne 0 ]; then
    echo "quickstart failed with $status; the agent's last words:" >&2
    tail -n 20 "$place/agent.log" >&2
  fi
  touch "$place/stop"
  end "$writer"
  if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
    "$replica" unprotect quickstart >/dev/null 2>&1
  fi
  end "$daemon"
  # Only if the agent could not: the pins of this volume, under its own id.
  [ -n "$volume" ] && [ -d "/sys/fs/bpf/replica/$volume" ] && rm -r "/sys/fs/bpf/replica/$volume"
  for at in "$mount" "$place/back"; do
    mountpoint -q "$at" && umount "$at"
  done
  [ -n "$loop" ] && losetup --detach "$loop"
  [ -n "$restored_loop" ] && losetup --detach "$restored_loop"
  rm -rf "$place"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Transactions without end: each raises a counter and books the same number in a ledger,
# so that the two agree in every state that a database may be found in. `acked` holds the
# last number that SQLite reported as durable.
write_transactions() {
  local n=0 sql
  while [ ! -e "$place/stop" ]; do
    sql="PRAGMA synchronous = FULL;"
    for _ in 1 2 3 4 5; do
      sql+="BEGIN; UPDATE counter SET n = n + 1;
            INSERT INTO ledger SELECT n, randomblob(400) FROM counter; COMMIT;"
    done
    sqlite3 "$mount/bank.db" "$sql" >/dev/null
    n=$((n + 5))
    echo "$n" >"$place/acked.new"
    mv "$place/acked.new" "$place/acked"
  done
}

acked() { cat "$place/acked" 2>/dev/null || echo 0; }
point_of() { "$replica" point quickstart --label "$1"; }

say "a 1 GiB disk with ext4, mounted and in use"
truncate -s 1G "$disk"
loop=$(losetup --find --show "$disk")
mkfs.ext4 -q "$loop"
mount "$loop" "$mount"
sqlite3 "$mount/bank.db" "PRAGMA journal_mode = WAL; CREATE TABLE counter (n INTEGER);
  INSERT INTO counter VALUES (0); CREATE TABLE ledger (n INTEGER PRIMARY KEY, note BLOB);" >/dev/null
fact "$loop, mounted at $mount, database in WAL mode"

say "the agent starts, and protects it without unmounting"
"$replica" run >"$place/agent.log" 2>&1 &
daemon=$!
for _ in $(seq 100); do
  [ -S "$REPLICA_SOCKET" ] && break
  kill -0 "$daemon" 2>/dev/null || { echo "the agent did not start" >&2; exit 1; }
  sleep 0.1
done
write_transactions &
writer=$!
"$replica" protect "$loop" --to "$store" --name quickstart --every 10s --wait
volume=$("$replica" status quickstart --json | sed -n 's/.*"id": *"\([0-9a-f]*\)".*/\1/p' | head -n 1)
"$replica" status quickstart | sed 's/^/        /'

say "a real workload: a source tree is unpacked while transactions go on"
sources=${CARGO_HOME:-$HOME/.cargo}/registry/src
[ -d "$sources" ] || sources=/usr/share/doc
(cd "$sources" && find . -type f -size -1024k -print0 | LC_ALL=C sort -z) >"$place/all"
head -z -n 5000 "$place/all" >"$place/list"
mkdir "$mount/tree"
tar -C "$sources" --null -T "$place/list" -cf - | tar -C "$mount/tree" -xf -
(cd "$mount/tree" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) >"$place/manifest"
fact "$(wc -l <"$place/manifest") files, $(du -sm "$mount/tree" | cut -f 1) MiB; transaction $(acked)"

say "the point before the loss"
sync -f "$mount"
least=$(acked)
before=$(point_of before)
most=$(($(acked) + 10))
fact "point $before, between transactions $least and $most"

say "the loss: half of the tree and of the ledger"
touch "$place/stop"
wait "$writer"
writer=
(cd "$mount/tree" && find . -type f | LC_ALL=C sort | awk 'NR % 2' | tr '\n' '\0' | xargs -0 rm -f)
sqlite3 "$mount/bank.db" "DELETE FROM ledger WHERE n % 2 = 0; UPDATE counter SET n = -1;"
fact "$(find "$mount/tree" -type f | wc -l) files are left; the counter says $(sqlite3 "$mount/bank.db" 'SELECT n FROM counter')"
after=$(point_of after)
dd if=/dev/urandom of="$mount/noise" bs=1M count=50 status=none
last=$(point_of last)
fact "and two points more: $after, $last"
"$replica" points quickstart | sed 's/^/        /'

say "the machine is gone: agent stopped, disk deleted; only the store is left"
"$replica" unprotect quickstart
end "$daemon"
daemon=
umount "$mount"
losetup --detach "$loop"
loop=
rm -rf "$disk" "$REPLICA_STATE_DIR"
fact "the store holds $(du -sm "$store" | cut -f 1) MiB"

say "the point before the loss comes back from the store"
"$replica" store check "$store" | sed 's/^/        /'
"$replica" restore quickstart --point "$before" --output "$restored" --store "$store" | sed 's/^/        /'

say "what came back"
e2fsck -fn "$restored" | tail -n 1 | sed 's/^/        e2fsck: /'
mkdir "$place/back"
restored_loop=$(losetup --find --show --read-only "$restored")
mount -o ro "$restored_loop" "$place/back"
mkdir "$place/bank"
cp "$place/back"/bank.db* "$place/bank/"
ask() { sqlite3 "$place/bank/bank.db" "$1"; }
integrity=$(ask "PRAGMA integrity_check")
counter=$(ask "SELECT n FROM counter")
ledger=$(ask "SELECT count(*) || ' ' || ifnull(max(n), 0) FROM ledger")
fact "SQLite: integrity $integrity, counter $counter, ledger (rows, last) $ledger"
[ "$integrity" = ok ] || { echo "the database is damaged" >&2; exit 1; }
[ "$ledger" = "$counter $counter" ] || { echo "counter and ledger do not agree" >&2; exit 1; }
[ "$counter" -ge "$least" ] || { echo "acknowledged transactions are lost" >&2; exit 1; }
[ "$counter" -le "$most" ] || { echo "the database is newer than the point" >&2; exit 1; }
(cd "$place/back/tree" && sha256sum --check --quiet "$place/manifest")
fact "tree: all $(wc -l <"$place/manifest") files as they were, by SHA-256"

say "nothing was lost"
