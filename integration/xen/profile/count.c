/*
 * A QEMU plugin that counts how often each translation block is executed by each CPU of the emulated machine.
 *
 * When a program of the machine executes the marker (see mark.S) everything counted so far is written to a file:
 * PREFIX.1 for the first marker, PREFIX.2 for the second, and so on. A line is
 *
 *     ADDRESS INSTRUCTIONS EXECUTIONS-BY-CPU-0 EXECUTIONS-BY-CPU-1
 *
 * with the block's virtual address in hexadecimal. Arguments: out=PREFIX.
 *
 * QEMU tells a plugin the CPU that translated a block, not the one that executes it, when one thread runs all CPUs. For
 * kernels and programs these are the same, as each CPU has a domain of its own and domains share no memory with code.
 * Xen's code is executed by both; there the stack tells, and whose stack it is, what is executed when Xen has left it.
 *
 * The declarations are those of QEMU's documented plugin interface (docs/devel/tcg-plugins), API version 4, as far as
 * they are used; its header would need the headers of GLib. The machine has to run with -icount: all its CPUs then take
 * turns in one thread, which is why nothing here is locked or atomic.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;
enum callback_registers { NO_REGISTERS, READS_REGISTERS };

/* GLib's array types have this much to see; QEMU brings their functions along. */
struct array {
    char *data;
    unsigned int length;
};

struct register_descriptor {
    void *handle;
    const char *name;
    const char *feature;
};

struct array *g_byte_array_new(void);
struct array *g_byte_array_set_size(struct array *array, unsigned int length);
struct array *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(void *handle, struct array *to);
void qemu_plugin_register_vcpu_init_cb(plugin_id id, void (*callback)(plugin_id, unsigned int));

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*callback)(unsigned int, void *),
                                          enum callback_registers registers, void *data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, void (*callback)(unsigned int, void *),
                                            enum callback_registers registers, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *to, size_t length);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);

EXPORT int qemu_plugin_version = 4;

#define CPUS 2
/* Xen's part of the address space (its public header arch-x86/xen-x86_64.h). */
#define XEN_START UINT64_C(0xffff800000000000)
#define XEN_END UINT64_C(0xffff880000000000)
/* Xen's stacks are aligned to their size. Each CPU has one, but while Xen starts there are more. */
#define STACK_SIZE UINT64_C(0x8000)
#define STACKS 16
#define BUCKETS (1u << 18)

/* Blocks of the same address and length share one: code is translated again when QEMU's cache has been emptied. */
struct block {
    struct block *next;
    uint64_t address;
    uint64_t instructions;
    uint64_t executions[CPUS];
};

static struct block *buckets[BUCKETS];
/* A stack of Xen's, and how often each CPU was seen to go on after Xen had used it. */
struct stack {
    uint64_t base;
    uint64_t votes[CPUS];
};

static struct stack stacks[STACKS];
static struct stack *last_used;
static const char *prefix;
static unsigned int markers;
static void *stack_pointer;
static struct array *value;

static struct block *block_of(uint64_t address, uint64_t instructions)
{
    struct block **bucket = &buckets[(address * UINT64_C(0x9e3779b97f4a7c15)) >> 46];
    struct block *block;

    for (block = *bucket; block; block = block->next) {
        if (block->address == address && block->instructions == instructions) {
            return block;
        }
    }
    block = calloc(1, sizeof *block);
    if (!block) {
        abort();
    }
    block->address = address;
    block->instructions = instructions;
    block->next = *bucket;
    *bucket = block;
    return block;
}

static void count(unsigned int cpu, void *data)
{
    struct block *block = data;

    if (cpu < CPUS) {
        block->executions[cpu]++;
    }
}

static void count_outside_xen(unsigned int cpu, void *data)
{
    if (last_used && cpu < CPUS) {
        last_used->votes[cpu]++;
        last_used = NULL;
    }
    count(cpu, data);
}

static struct stack *stack_of(uint64_t address)
{
    uint64_t base = address & ~(STACK_SIZE - 1);
    size_t i;

    for (i = 0; i < STACKS; i++) {
        if (stacks[i].base == 0) {
            stacks[i].base = base;
        }
        if (stacks[i].base == base) {
            return &stacks[i];
        }
    }
    return NULL;
}

/* What is executed with a guest's stack, the first instructions of an entry, is in a page that one CPU has for itself. */
static void count_in_xen(unsigned int cpu, void *data)
{
    struct stack *stack = NULL;
    uint64_t address;

    g_byte_array_set_size(value, 0);
    if (qemu_plugin_read_register(stack_pointer, value) == sizeof address) {
        memcpy(&address, value->data, sizeof address);
        if (address >= XEN_START && address < XEN_END) {
            stack = stack_of(address);
        }
    }
    if (stack) {
        last_used = stack;
        cpu = stack->votes[1] > stack->votes[0];
    }
    count(cpu, data);
}

/* Written under another name first: whoever sees the file sees all of it. */
static void write_counts(unsigned int cpu, void *data)
{
    char part[4096], name[4096];
    const struct block *block;
    FILE *out;
    size_t i;

    (void)cpu;
    (void)data;
    markers++;
    snprintf(name, sizeof name, "%s.%u", prefix, markers);
    snprintf(part, sizeof part, "%s.part", prefix);
    out = fopen(part, "w");
    if (!out) {
        perror(part);
        abort();
    }
    for (i = 0; i < BUCKETS; i++) {
        for (block = buckets[i]; block; block = block->next) {
            if (block->executions[0] || block->executions[1]) {
                fprintf(out, "%" PRIx64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions,
                        block->executions[0], block->executions[1]);
            }
        }
    }
    if (fclose(out) || rename(part, name)) {
        perror(name);
        abort();
    }
}

static bool is_marker(const struct qemu_plugin_insn *insn)
{
    static const uint8_t marker[8] = {0x0f, 0x1f, 0x84, 0x00, 0xde, 0xc0, 0x10, 0x7e};
    uint8_t bytes[8];

    return qemu_plugin_insn_size(insn) == sizeof bytes && qemu_plugin_insn_data(insn, bytes, sizeof bytes) == sizeof bytes
        && !memcmp(bytes, marker, sizeof bytes);
}

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
    size_t n = qemu_plugin_tb_n_insns(tb), i;
    uint64_t address = qemu_plugin_tb_vaddr(tb);

    (void)id;
    if (address >= XEN_START && address < XEN_END) {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, count_in_xen, READS_REGISTERS, block_of(address, n));
    } else {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, count_outside_xen, NO_REGISTERS, block_of(address, n));
    }
    for (i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

        if (is_marker(insn)) {
            qemu_plugin_register_vcpu_insn_exec_cb(insn, write_counts, NO_REGISTERS, NULL);
        }
    }
}

static void started(plugin_id id, unsigned int cpu)
{
    const struct array *registers = qemu_plugin_get_registers();
    const struct register_descriptor *found = (const void *)registers->data;
    unsigned int i;

    (void)id;
    (void)cpu;
    for (i = 0; i < registers->length; i++) {
        if (!strcmp(found[i].name, "rsp")) {
            stack_pointer = found[i].handle;
        }
    }
    if (!stack_pointer) {
        fprintf(stderr, "count: the emulated CPU has no register rsp\n");
        abort();
    }
}

EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info *info, int argc, char **argv)
{
    int i;

    (void)info;
    for (i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            prefix = argv[i] + 4;
        }
    }
    if (!prefix) {
        fprintf(stderr, "count: the argument out=PREFIX is missing\n");
        return 1;
    }
    value = g_byte_array_new();
    qemu_plugin_register_vcpu_init_cb(id, started);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}
