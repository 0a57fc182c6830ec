// Compiles a kernel's source by the NVRTC of the image that this runs in, as sida does when it opens a GPU: by the name that
// cudarc loads, to machine code, for a device that need not be there. Compiled and run by in_podman.py.
//
//     nvrtc SOURCE OPTION...

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

static char source[1 << 20];
static char log_text[1 << 16];

int main(int count, const char **words) {
    FILE *file = count > 1 ? fopen(words[1], "r") : NULL;
    if (!file || fread(source, 1, sizeof source - 1, file) == 0) return fprintf(stderr, "no source\n"), 1;
    void *library = dlopen("libnvrtc.so.13", RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    int (*create)(void **, const char *, const char *, int, const char *const *, const char *const *) =
        dlsym(library, "nvrtcCreateProgram");
    int (*compile)(void *, int, const char *const *) = dlsym(library, "nvrtcCompileProgram");
    int (*log_bytes)(void *, size_t *) = dlsym(library, "nvrtcGetProgramLogSize");
    int (*log)(void *, char *) = dlsym(library, "nvrtcGetProgramLog");
    int (*cubin_bytes)(void *, size_t *) = dlsym(library, "nvrtcGetCUBINSize");
    if (!create || !compile || !log_bytes || !log || !cubin_bytes) return fprintf(stderr, "%s\n", dlerror()), 1;
    void *program;
    if (create(&program, source, words[1], 0, NULL, NULL)) return fprintf(stderr, "no program\n"), 1;
    size_t bytes = 0;
    int code = compile(program, count - 2, words + 2);
    if (code) {
        if (!log_bytes(program, &bytes) && bytes <= sizeof log_text && !log(program, log_text)) fputs(log_text, stderr);
        return fprintf(stderr, "NVRTC says %d\n", code), 1;
    }
    if (cubin_bytes(program, &bytes) || !bytes) return fprintf(stderr, "no machine code\n"), 1;
    printf("NVRTC made %zu bytes of machine code\n", bytes);
    return 0;
}
