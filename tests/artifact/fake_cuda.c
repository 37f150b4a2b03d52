/* A driver that runs nothing and writes down what it is asked: the calls of libcuda that a launch takes.

   Parameters are read at the addresses that a launch gives, by the kinds that fake_kinds() was told: p(ointer),
   i(nt32), l(ong), f(loat). */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char journal[1 << 20], kinds[256], symbols[256][128];
static size_t used;
static int modules, functions, failing;

static void note(const char *format, ...) {
    va_list list;
    va_start(list, format);
    used += vsnprintf(journal + used, sizeof journal - used, format, list);
    va_end(list);
}

const char *fake_journal(void) { return journal; }
void fake_clear(void) { used = 0; journal[0] = 0; }
void fake_kinds(const char *text) { strncpy(kinds, text, sizeof kinds - 1); }
void fake_fail(int code) { failing = code; }

int cuModuleLoadData(void **module, const void *image) {
    const unsigned char *bytes = image;
    int elf = bytes[0] == 0x7f && bytes[1] == 'E' && bytes[2] == 'L' && bytes[3] == 'F';
    if (!elf && !strstr((const char *)image, ".version")) return 200;
    *module = (void *)(intptr_t)++modules;
    note("load %s\n", elf ? "cubin" : "ptx");
    return failing;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    strncpy(symbols[++functions], name, 127);
    *function = (void *)(intptr_t)functions;
    note("function %s\n", name);
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    note("attribute %d %d\n", attribute, value);
    return 0;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 700 ? "an illegal memory access was encountered" : "unknown";
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    note("launch %s grid %u %u %u block %u %u %u shared %u stream %ld", symbols[(intptr_t)function], gx, gy, gz, bx, by,
         bz, shared, (long)(intptr_t)stream);
    for (size_t i = 0; kinds[i]; i++) {
        if (kinds[i] == 'p') note(" %lx", (long)*(uintptr_t *)params[i]);
        if (kinds[i] == 'i') note(" %d", *(int32_t *)params[i]);
        if (kinds[i] == 'l') note(" %ld", (long)*(int64_t *)params[i]);
        if (kinds[i] == 'f') note(" %g", (double)*(float *)params[i]);
    }
    note("\n");
    return extra ? 1 : failing;
}
