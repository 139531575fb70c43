// SPDX-License-Identifier: MIT OR GPL-2.0
//
// Which blocks of one disk were written: three programs on the block layer's
// tracepoints, which set bits in a bitmap that user space has mapped.
//
// A block is marked when its write is submitted, and again when the write completes:
// user space may have taken the first mark away, and read the block too early, while
// the write was still on its way.
//
// A bio that was made into a request completes with it, as block_rq_complete, which knows
// the range; block_bio_complete then stays silent. All others complete as
// block_bio_complete, where the bio no longer knows what it covered: its iterator has run
// to the end, and a driver may have sent it to another device. So what a write covers is
// noted at submission, under the bio's address. The notes also tell what is in flight.
//
// Nothing is dropped: whatever cannot be recorded exactly adds to a cause, and user space
// takes a cause that grew to mean "the whole volume".
//
// Built by scripts/bpf; needs no kernel headers. The types below name only the fields that
// are read; their places in the running kernel are filled in at load (CO-RE).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
#define inline_always static inline __attribute__((always_inline))

enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_ARRAY = 2 };
enum { BPF_ANY = 0, BPF_NOEXIST = 1 };
enum { BPF_F_MMAPABLE = 1 << 10 };

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*bpf_loop)(u32 count, void *body, void *context, u64 flags) = (void *)181;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct gendisk {
	int major;
	int first_minor;
	u64 diskseq;
};
struct block_device {
	struct gendisk *bd_disk;
};
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
};
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	struct bvec_iter bi_iter;
	void *bi_private;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u64 __sector;
	struct bio *bio;
};
#pragma clang attribute pop

// Operations; the low eight bits of the flags. Odd ones change data. The numbers of the
// four that say where they write have never changed; those of the others have.
enum {
	OP_MASK = 0xff,
	OP_READ = 0,
	OP_WRITE = 1,
	OP_DISCARD = 3,
	OP_SECURE_ERASE = 5,
	OP_WRITE_ZEROES = 9,
	OP_DRV_IN = 34,
	OP_DRV_OUT = 35,
};

// Why the whole volume must be taken for written. Same order as `Cause` in state.rs.
enum cause {
	TABLE_FULL, // no room to note a write in flight
	UNMATCHED, // a write completed whose submission was not seen
	UNKNOWN_OPERATION, // it changes data, but not known where
	PASS_THROUGH, // a command past the block layer
	RANGE, // a range could not be marked whole
	BEYOND_END, // a write behind the end: the device has grown
	CAUSES = 8,
};

// Who completes writes on this disk: `completion` below.
enum { BY_REQUEST = 1, BY_BIO = 2 };
enum { PROBE_ALL = 1, PROBE_ENDS = 2 }; // `probing` below

// The one value of `state`. Same words as in state.rs.
struct state {
	u64 magic, version;
	u64 major, first_minor, diskseq;
	u64 sectors; // 512 bytes each
	u64 block_shift; // a block is 1 << block_shift sectors
	u64 level1, level2, stride; // in words: where a part's levels begin, a part's length
	u64 completion;
	u64 identity[13]; // user space's own: see state.rs
	u64 active; // which part takes the marks: 0 or 1
	u64 probing; // reads too: PROBE_ALL, or only the end of those that were begun
	u64 notes[22]; // user space's own: see state.rs
	// Below, counters; each group that is written together on cache lines of its own.
	u64 submitted, submitted_sectors, pad0[6];
	u64 completed, completed_sectors, pad1[6];
	u64 requests, request_sectors, stale, stale_sectors, pad2[4];
	u64 causes[CAUSES];
	u64 probe_submitted, probe_completed, probe_requests, pad3[5];
};
_Static_assert(sizeof(struct state) == 88 * 8, "the words of state.rs");

struct flight {
	u64 sector;
	u32 sectors;
	u32 kind;
	u64 serial; // tells two bios at the same address apart
	u64 left; // sectors that have not completed
};
enum { FLIGHT_RANGE, FLIGHT_WHOLE, FLIGHT_PROBE };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct state);
} state SEC(".maps");

// Three parts of the same layout, one behind the other: two that take marks in turn,
// and one that only user space touches. A part has three levels: a bit for each block,
// a bit for each word of those, a bit for each word of these.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); // set at load
	__type(key, u32);
	__type(value, u64);
} bits SEC(".maps");

// Writes submitted and not completed, by the bio's address.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); // set at load
	__type(key, u64);
	__type(value, struct flight);
} flights SEC(".maps");

// The value is used, so that the operation orders memory on every architecture: a mark
// is there before the count that says the write is complete.
inline_always u64 add(u64 *counter, u64 n)
{
	u64 before = __sync_fetch_and_add(counter, n);
	asm volatile("" ::"r"(before));
	return before;
}

inline_always struct state *the_state(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&state, &zero);
}

inline_always int ours(struct state *s, struct gendisk *disk)
{
	return (u64)(u32)disk->first_minor == s->first_minor &&
	       (u64)(u32)disk->major == s->major && disk->diskseq == s->diskseq;
}

inline_always int says_where(u32 op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_SECURE_ERASE ||
	       op == OP_WRITE_ZEROES;
}

struct marks {
	u64 first, last; // blocks
	u64 base, level1, level2; // words
	u64 failed;
};

inline_always int set(u64 index, u64 mask)
{
	u32 key = (u32)index;
	u64 *word = bpf_map_lookup_elem(&bits, &key);
	if (!word)
		return 0;
	if ((*(volatile u64 *)word & mask) != mask)
		__sync_fetch_and_or(word, mask);
	return 1;
}

// Marks what `m` has in its word number `i`; 1 ends bpf_loop.
static long mark_word(u32 i, struct marks *m)
{
	u64 word = (m->first >> 6) + i, from = word << 6, mask = ~0ULL;
	if (from < m->first)
		mask &= ~0ULL << (m->first & 63);
	if (m->last < from + 63)
		mask &= ~0ULL >> (63 - (m->last & 63));
	if (!set(m->base + word, mask) ||
	    !set(m->base + m->level1 + (word >> 6), 1ULL << (word & 63)) ||
	    !set(m->base + m->level2 + (word >> 12), 1ULL << ((word >> 6) & 63)))
		m->failed = 1;
	return m->failed;
}

// Not inlined: verified once, not at each of its callers.
static __attribute__((noinline)) int mark(u64 sector, u64 sectors)
{
	struct state *s = the_state();
	if (!s || !sectors)
		return 0;
	if (sector >= s->sectors || sectors > s->sectors - sector) {
		add(&s->causes[BEYOND_END], 1);
		if (sector >= s->sectors)
			return 0;
		sectors = s->sectors - sector;
	}
	u32 shift = s->block_shift & 63;
	u64 active = *(volatile u64 *)&s->active & 1;
	struct marks m = {
		.first = sector >> shift,
		.last = (sector + sectors - 1) >> shift,
		.base = active ? s->stride : 0,
		.level1 = s->level1,
		.level2 = s->level2,
	};
	u32 words = (u32)((m.last >> 6) - (m.first >> 6)) + 1;
	if (words == 1)
		mark_word(0, &m);
	else if (bpf_loop(words, mark_word, &m, 0) != words)
		m.failed = 1;
	if (m.failed)
		add(&s->causes[RANGE], 1);
	return 0;
}

inline_always void mark_flight(struct state *s, struct flight *f)
{
	if (f->kind == FLIGHT_RANGE)
		mark(f->sector, f->sectors);
	else if (f->kind == FLIGHT_WHOLE)
		add(&s->causes[UNKNOWN_OPERATION], 1);
}

// Counts sectors of a flight as complete, or the last of them.
inline_always void count_sectors(struct state *s, u32 kind, u64 sectors)
{
	if (kind != FLIGHT_PROBE)
		add(&s->completed_sectors, sectors);
}

inline_always void count_landed(struct state *s, u32 kind)
{
	add(kind == FLIGHT_PROBE ? &s->probe_completed : &s->completed, 1);
}

// Marks what is complete, then counts it so: never the other way about.
inline_always void land(struct state *s, struct flight *f)
{
	mark_flight(s, f);
	count_sectors(s, f->kind, f->left);
	count_landed(s, f->kind);
}

SEC("tp_btf/block_bio_queue")
int bio_queue(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[0];
	u64 key = ctx[0];
	struct state *s = the_state();
	if (!s)
		return 0;
	u32 op = bio->bi_opf & OP_MASK;
	int follow_read = op == OP_READ && s->probing == PROBE_ALL;
	if (!(op & 1) && !follow_read)
		return 0;
	if (!ours(s, bio->bi_bdev->bd_disk))
		return 0;
	u32 sectors = bio->bi_iter.bi_size >> 9;
	struct flight f = {
		.sector = bio->bi_iter.bi_sector,
		.sectors = sectors,
		.left = sectors,
		.kind = follow_read ? FLIGHT_PROBE : says_where(op) ? FLIGHT_RANGE : FLIGHT_WHOLE,
	};
	struct flight *old = bpf_map_lookup_elem(&flights, &key);
	if (old) {
		// The address is used again: the completion of the bio before it was missed.
		add(&s->stale, 1);
		if (old->kind != FLIGHT_PROBE)
			add(&s->stale_sectors, old->left);
		land(s, old);
	}
	if (follow_read) {
		add(&s->probe_submitted, 1);
	} else {
		add(&s->submitted_sectors, sectors);
		f.serial = add(&s->submitted, 1);
	}
	// What finds no room counts as complete; when it does complete, its request marks
	// it, or it is found unmatched.
	if (bpf_map_update_elem(&flights, &key, &f, BPF_ANY)) {
		add(&s->causes[TABLE_FULL], 1);
		land(s, &f);
	} else {
		mark_flight(s, &f);
	}
	return 0;
}

// `sectors` of the bio at `key` are complete, or of one that was split off it, and has it
// as its private data.
inline_always void lands_in_part(struct state *s, u64 key, u64 whole, u64 sectors)
{
	struct flight *f = bpf_map_lookup_elem(&flights, &key);
	if (!f) {
		key = whole;
		f = bpf_map_lookup_elem(&flights, &key);
		if (!f)
			return;
	}
	u32 kind = f->kind;
	count_sectors(s, kind, sectors);
	if (__sync_fetch_and_sub(&f->left, sectors) <= sectors) {
		bpf_map_delete_elem(&flights, &key);
		count_landed(s, kind);
	}
}

SEC("tp_btf/block_bio_complete")
int bio_complete(u64 *ctx)
{
	struct bio *bio = (struct bio *)ctx[1];
	u64 key = ctx[1];
	struct state *s = the_state();
	if (!s)
		return 0;
	u32 op = bio->bi_opf & OP_MASK;
	if (!(op & 1) && !(op == OP_READ && s->probing))
		return 0;
	struct flight *found = bpf_map_lookup_elem(&flights, &key);
	if (found) {
		struct flight f = *found;
		bpf_map_delete_elem(&flights, &key);
		land(s, &f);
		return 0;
	}
	if (!ours(s, bio->bi_bdev->bd_disk))
		return 0;
	u64 whole = (u64)bio->bi_private;
	if (s->completion == BY_REQUEST) {
		// Split off, and failed before it was made into a request.
		lands_in_part(s, key, whole, bio->bi_iter.bi_size >> 9);
	} else if ((op & 1) && !bpf_map_lookup_elem(&flights, &whole)) {
		// A piece that was split off completes before the whole, which is noted.
		// This is none.
		add(&s->causes[UNMATCHED], 1);
	}
	return 0;
}

struct chain {
	u64 bio; // the next of the request
	u64 left; // sectors of the request that have completed, from this bio on
	u64 marking; // whether each bio's range is to be marked
};

// Sees to one bio of a request, or what of it has completed; 1 ends bpf_loop.
static long next_bio(u32 i, struct chain *chain)
{
	struct bio *bio = (struct bio *)chain->bio;
	struct state *s = the_state();
	u64 key = chain->bio, sector = 0, whole = 0;
	u32 size = 0;
	if (!s || !bio)
		return 1;
	bpf_probe_read_kernel(&sector, 8, &bio->bi_iter.bi_sector);
	bpf_probe_read_kernel(&size, 4, &bio->bi_iter.bi_size);
	bpf_probe_read_kernel(&whole, 8, &bio->bi_private);
	bpf_probe_read_kernel(&chain->bio, 8, &bio->bi_next);
	u64 sectors = size >> 9;
	if (sectors > chain->left)
		sectors = chain->left;
	chain->left -= sectors;
	if (chain->marking)
		mark(sector, sectors);
	lands_in_part(s, key, whole, sectors);
	// What has not completed begins here.
	if (sectors < size >> 9)
		chain->bio = 0;
	return !chain->bio;
}
enum { MAX_BIOS = 4096 };

SEC("tp_btf/block_rq_complete")
int rq_complete(u64 *ctx)
{
	struct request *rq = (struct request *)ctx[0];
	u64 sectors = (u32)ctx[2] >> 9;
	struct state *s = the_state();
	if (!s)
		return 0;
	u32 op = rq->cmd_flags & OP_MASK;
	if (!(op & 1) && !(op == OP_READ && s->probing))
		return 0;
	if (!ours(s, rq->q->disk))
		return 0;
	struct chain chain = { .bio = (u64)rq->bio, .left = sectors };
	if (op == OP_READ) {
		add(&s->probe_requests, 1);
	} else if (op == OP_DRV_OUT) {
		add(&s->causes[PASS_THROUGH], 1);
		return 0;
	} else if (says_where(op)) {
		add(&s->requests, 1);
		add(&s->request_sectors, sectors);
		mark(rq->__sector, sectors);
		// A merged discard has as many ranges as bios.
		chain.marking = op != OP_WRITE;
	} else {
		add(&s->causes[UNKNOWN_OPERATION], 1);
	}
	if (!next_bio(0, &chain))
		bpf_loop(MAX_BIOS, next_bio, &chain, 0);
	if (chain.bio)
		add(&s->causes[RANGE], 1);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
