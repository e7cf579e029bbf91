#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* MAP_ANONYMOUS, strsignal */
#endif
#include "system.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEST_SECONDS = 600 };

#if defined(_WIN32)

#include <windows.h>

size_t system_page(void) {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

void *system_pages(size_t size) { return VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_NOACCESS); }

int system_allow(void *pages, size_t size, enum page_access access) {
    static const DWORD protections[] = {PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE};
    DWORD before;
    return VirtualProtect(pages, size, protections[access], &before) != 0;
}

void system_release(void *pages, size_t size) {
    (void)size;
    VirtualFree(pages, 0, MEM_RELEASE);
}

static HANDLE shared;

/* A test apart is PROGRAM EFFORT --apart MAPPING NAME ISA. */
static int is_apart(int argc, char **argv) { return argc == 6 && !strcmp(argv[2], "--apart"); }

void *system_shared(size_t size, int argc, char **argv) {
    SECURITY_ATTRIBUTES inherited = {sizeof inherited, NULL, TRUE};
    if (is_apart(argc, argv))
        shared = (HANDLE)(uintptr_t)strtoull(argv[3], NULL, 10);
    else
        shared = CreateFileMappingA(INVALID_HANDLE_VALUE, &inherited, PAGE_READWRITE, 0, (DWORD)size, NULL);
    return shared ? MapViewOfFile(shared, FILE_MAP_ALL_ACCESS, 0, 0, size) : NULL;
}

const char *system_asked_for(int argc, char **argv, int *isa) {
    if (!is_apart(argc, argv)) return NULL;
    *isa = atoi(argv[5]);
    return argv[4];
}

int system_run(void (*run)(void), const char *name, int isa, int effort, char *how, size_t size) {
    char program[MAX_PATH], command[2 * MAX_PATH];
    STARTUPINFOA startup = {.cb = sizeof startup};
    PROCESS_INFORMATION process;
    DWORD status = 0;
    (void)run;
    GetModuleFileNameA(NULL, program, sizeof program);
    snprintf(command, sizeof command, "\"%s\" %d --apart %llu %s %d", program, effort, (unsigned long long)(uintptr_t)shared, name, isa);
    if (!CreateProcessA(program, command, NULL, NULL, TRUE, 0, NULL, NULL, &startup, &process)) {
        snprintf(how, size, "no process: error %lu", GetLastError());
        return -1;
    }
    if (WaitForSingleObject(process.hProcess, TEST_SECONDS * 1000) != WAIT_OBJECT_0) TerminateProcess(process.hProcess, 0xffffffff);
    GetExitCodeProcess(process.hProcess, &status);
    CloseHandle(process.hThread);
    CloseHandle(process.hProcess);
    if (status <= 255) return (int)status;
    snprintf(how, size, "exception %#lx", status);
    return -1;
}

void system_exit(int status) {
    fflush(NULL);
    _exit(status);
}

static void (*report_fault)(const void *at);

static LONG WINAPI on_fault(EXCEPTION_POINTERS *found) {
    const EXCEPTION_RECORD *record = found->ExceptionRecord;
    const int access = record->ExceptionCode == EXCEPTION_ACCESS_VIOLATION;
    report_fault(access ? (const void *)record->ExceptionInformation[1] : NULL);
    TerminateProcess(GetCurrentProcess(), record->ExceptionCode);
    return EXCEPTION_EXECUTE_HANDLER;
}

void system_on_fault(void (*report)(const void *at)) {
    report_fault = report;
    SetUnhandledExceptionFilter(on_fault);
}

#elif defined(__EMSCRIPTEN__)

#include <setjmp.h>

size_t system_page(void) { return 4096; }

void *system_pages(size_t size) {
    void *pages = NULL;
    return posix_memalign(&pages, 4096, size) == 0 ? pages : NULL;
}

int system_allow(void *pages, size_t size, enum page_access access) {
    (void)pages, (void)size, (void)access;
    return 1;
}

void system_release(void *pages, size_t size) {
    (void)size;
    free(pages);
}

void *system_shared(size_t size, int argc, char **argv) {
    (void)argc, (void)argv;
    return calloc(1, size);
}

const char *system_asked_for(int argc, char **argv, int *isa) {
    (void)argc, (void)argv, (void)isa;
    return NULL;
}

static jmp_buf after_the_test;
static int status_of_test;

int system_run(void (*run)(void), const char *name, int isa, int effort, char *how, size_t size) {
    (void)name, (void)isa, (void)effort, (void)how, (void)size;
    status_of_test = 0;
    if (setjmp(after_the_test) == 0) run();
    return status_of_test;
}

void system_exit(int status) {
    status_of_test = status;
    longjmp(after_the_test, 1);
}

void system_on_fault(void (*report)(const void *at)) { (void)report; }

#else

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

size_t system_page(void) { return (size_t)sysconf(_SC_PAGESIZE); }

void *system_pages(size_t size) {
    void *pages = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}

int system_allow(void *pages, size_t size, enum page_access access) {
    static const int protections[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
    return mprotect(pages, size, protections[access]) == 0;
}

void system_release(void *pages, size_t size) { munmap(pages, size); }

void *system_shared(size_t size, int argc, char **argv) {
    (void)argc, (void)argv;
    void *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return shared == MAP_FAILED ? NULL : shared;
}

const char *system_asked_for(int argc, char **argv, int *isa) {
    (void)argc, (void)argv, (void)isa;
    return NULL;
}

int system_run(void (*run)(void), const char *name, int isa, int effort, char *how, size_t size) {
    int status = 0;
    (void)name, (void)isa, (void)effort;
    const pid_t child = fork();
    if (child == 0) {
        alarm(TEST_SECONDS);
        run();
        exit(0); /* not _exit: leak checkers report here */
    }
    if (child < 0 || waitpid(child, &status, 0) < 0)
        snprintf(how, size, "no child: %s", strerror(errno));
    else if (WIFEXITED(status))
        return WEXITSTATUS(status);
    else
        snprintf(how, size, "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    return -1;
}

void system_exit(int status) { _exit(status); }

static void (*report_fault)(const void *at);

static void on_fault(int number, siginfo_t *info, void *machine) {
    (void)machine;
    report_fault(number == SIGILL ? NULL : info->si_addr);
    signal(number, SIG_DFL); /* and let the signal take its course */
}

void system_on_fault(void (*report)(const void *at)) {
    static const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    report_fault = report;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) sigaction(numbers[i], &action, NULL);
}

#endif
