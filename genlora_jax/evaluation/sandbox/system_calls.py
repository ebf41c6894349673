"""The system calls that a program in the sandbox may make, as a filter for seccomp.

A list of what is allowed, since the kernel gains calls: whatever is not named fails with EPERM. A
program can compute, read the clock and use files. It cannot start a process or a thread, signal,
trace, change its rights, open a socket, or get memory that its bounds do not count.
"""

import errno
import platform
import struct
import sys

# Machine: its name in seccomp, and its column below.
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
# Name, number on x86_64, number on aarch64 ("-": it has none).
ALLOWED = """
read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; lseek 8 62
close 3 57; dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; sendfile 40 71
copy_file_range 326 285; fadvise64 221 223; fallocate 285 47; open 2 -; openat 257 56; stat 4 -
fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; statfs 137 43; fstatfs 138 44
access 21 -; faccessat 269 48; faccessat2 439 439; readlink 89 -; readlinkat 267 78
getdents64 217 61; getcwd 79 17; chdir 80 49; fchdir 81 50; mkdir 83 -; mkdirat 258 34
rmdir 84 -; unlink 87 -; unlinkat 263 35; rename 82 -; renameat 264 38; renameat2 316 276
link 86 -; linkat 265 37; symlink 88 -; symlinkat 266 36; chmod 90 -; fchmod 91 52
fchmodat 268 53; utimensat 280 88; truncate 76 45; ftruncate 77 46; umask 95 166; fsync 74 82
fdatasync 75 83; flock 73 32; mmap 9 222; munmap 11 215; mprotect 10 226; mremap 25 216
madvise 28 233; brk 12 214; membarrier 324 283; rt_sigaction 13 134; rt_sigprocmask 14 135
rt_sigreturn 15 139; sigaltstack 131 132; restart_syscall 219 128; pause 34 -; alarm 37 -
getitimer 36 102; setitimer 38 103; clock_gettime 228 113; clock_getres 229 114
clock_nanosleep 230 115; nanosleep 35 101; gettimeofday 96 169; time 201 -; times 100 153
futex 202 98; set_robust_list 273 99; set_tid_address 218 96; rseq 334 293; sched_yield 24 124
sched_getaffinity 204 123; getpid 39 172; getppid 110 173; gettid 186 178; getpgrp 111 -
getpgid 121 155; getsid 124 156; getuid 102 174; geteuid 107 175; getgid 104 176
getegid 108 177; getresuid 118 148; getresgid 120 150; getgroups 115 158; uname 63 160
sysinfo 99 179; getrusage 98 165; getrlimit 97 163; getrandom 318 278; select 23 -
pselect6 270 72; poll 7 -; ppoll 271 73; epoll_create1 291 20; epoll_ctl 233 21
epoll_wait 232 -; epoll_pwait 281 22; eventfd2 290 19; socketpair 53 199; recvfrom 45 207
getsockname 51 204; getsockopt 55 209; shutdown 48 210; exit 60 93; exit_group 231 94
fcntl 72 25; ioctl 16 29; prlimit64 302 261; sendto 44 206
"""
# Calls that depend on an argument: its index, and its values. The commands of fcntl that are left
# out name a process to signal or widen pipes; those of ioctl that are kept concern a descriptor
# alone; sendto could name a socket outside, prlimit64 another process.
ONLY = {
    "fcntl": (1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    "ioctl": (1, (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)),
    "prlimit64": (0, (0,)),
    "sendto": (4, (0,)),
}
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, DENY = 0x7FFF0000, 0x00050000 | errno.EPERM
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16  # offsets in what a filter sees of a call


def call_filter() -> bytes | None:
    """The filter in the kernel's form (classic BPF); None where none is known."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return None
    machine, column = MACHINES[platform.machine()]
    steps = [(LOAD, 0, 0, MACHINE), (JUMP_IF_EQUAL, 1, 0, machine), (RETURN, 0, 0, DENY)]
    steps.append((LOAD, 0, 0, NUMBER))
    for entry in ALLOWED.replace("\n", ";").split(";"):
        if entry and (number := entry.split()[column]) != "-":
            verdict = _verdict(*ONLY[name]) if (name := entry.split()[0]) in ONLY else [GRANT]
            steps += [(JUMP_IF_EQUAL, 0, len(verdict), int(number)), *verdict]
    steps.append((RETURN, 0, 0, DENY))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


GRANT = (RETURN, 0, 0, ALLOW)


def _verdict(index: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Allows a call if an argument, of 64 bits, has one of some small values."""
    low = ARGUMENTS + 8 * index
    steps = [(LOAD, 0, 0, low + 4), (JUMP_IF_EQUAL, 1, 0, 0), (RETURN, 0, 0, DENY)]
    steps.append((LOAD, 0, 0, low))
    for value in values:
        steps += [(JUMP_IF_EQUAL, 0, 1, value), GRANT]
    return [*steps, (RETURN, 0, 0, DENY)]
