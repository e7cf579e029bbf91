/* A plugin of QEMU's that counts the instructions of a program and prints their number when it ends, to stderr. It declares what it uses,
 * since few systems have QEMU's header; the interface is that of version 1 (QEMU 4.2 to 8).
 *
 *     cc -shared -fPIC bench/instructions.c -o instructions.so && qemu-aarch64 -plugin ./instructions.so PROGRAM */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { ADD = 0, VERSION = 1 };
struct qemu_plugin_tb;

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *number, uint64_t by);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t id, struct qemu_plugin_tb *block));
void qemu_plugin_register_atexit_cb(uint64_t id, void (*ends)(uint64_t id, void *data), void *data);

int qemu_plugin_version = VERSION;
static uint64_t executed;

static void translated(uint64_t id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &executed, qemu_plugin_tb_n_insns(block));
}

static void ends(uint64_t id, void *data) {
    (void)id, (void)data;
    fprintf(stderr, "instructions %llu\n", (unsigned long long)executed);
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ends, NULL);
    return 0;
}
