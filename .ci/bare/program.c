/* Just enough of Linux for a static test program with one thread, which runs in ring 0 of a machine that has nothing else.
   Bochs has put the program at PROGRAM and its arguments, a line each, at ARGUMENTS. What it writes goes to port 0xE9;
   "exit N" is the last line. What is not here: files, threads (the test harness does without), signals, time. */
#include <elf.h>

typedef unsigned long u64;
typedef unsigned char u8;

enum {
  ARGUMENTS = 0x300000,
  PROGRAM = 0x800000, /* up to 0x2000000 */
  BASE = 0x8000000,   /* of a position-independent program */
  STACK = 0x10000000, /* grows down towards the heap */
  STACK_BYTES = 0x1000000,
  MAPS = 0x10000000, /* anonymous maps, handed out in order */
  MEMORY = 0x3F000000,
};

u64 program_stack;
static u64 heap_start, heap_end, maps_end, ticks;
static u64 gates[64];
extern u8 faults[];
void on_syscall(void), enter(u64 at, u64 stack);

static void out(unsigned short port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "Nd"(port)); }
static void put(const char *text) { while (*text) out(0xE9, *text++); }
static void put_bytes(const u8 *at, u64 n) { while (n--) out(0xE9, *at++); }
static void put_hex(u64 value) { for (int bit = 60; bit >= 0; bit -= 4) out(0xE9, "0123456789abcdef"[value >> bit & 15]); }
static void put_decimal(u64 value) { if (value > 9) put_decimal(value / 10); out(0xE9, '0' + value % 10); }
static void set_register(unsigned which, u64 value) {
  __asm__ volatile("wrmsr" ::"c"(which), "a"((unsigned)value), "d"((unsigned)(value >> 32)));
}
static void copy(u64 to, u64 from, u64 n) { __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory"); }
static void clear(u64 at, u64 n) { __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(0) : "memory"); }
static u64 page_end(u64 at) { return (at + 4095) & ~4095ul; }

/* Bochs ends when it reads this word. */
static _Noreturn void end(void) {
  for (const char *word = "Shutdown"; *word; word++) out(0x8900, *word);
  for (;;) __asm__ volatile("cli; hlt");
}

void on_fault(u64 *frame) {
  u64 address;
  __asm__ volatile("mov %%cr2,%0" : "=r"(address));
  put("\nexception "), put_decimal(frame[0]), put(" at "), put_hex(frame[2]), put(", address "), put_hex(address), put("\n");
  end();
}

static long map(u64 bytes, u64 flags) {
  u64 at = maps_end;
  if (!(flags & 0x20)) return -19; /* not anonymous: ENODEV */
  bytes = page_end(bytes);
  if (flags & 0x10 || bytes > MEMORY - at) return -12; /* at a fixed place, or no room: ENOMEM */
  maps_end += bytes;
  clear(at, bytes);
  return at;
}

long linux_call(u64 number, u64 a, u64 b, u64 c, u64 d, u64 e) {
  (void)e;
  switch (number) {
  case 1: /* write */
    put_bytes((u8 *)b, c);
    return c;
  case 20: { /* writev */
    u64 sum = 0;
    for (u64 *part = (u64 *)b; c--; part += 2) put_bytes((u8 *)part[0], part[1]), sum += part[1];
    return sum;
  }
  case 9: /* mmap */
    return map(b, d);
  case 11: /* munmap: only the last is given back */
    if (a + page_end(b) == maps_end) maps_end = a;
    return 0;
  case 12: /* brk */
    if (a < heap_start || a > STACK - STACK_BYTES) return heap_end;
    if (a > heap_end) clear(heap_end, a - heap_end);
    return heap_end = a;
  case 96: case 228: /* gettimeofday, clock_gettime: later each time */
    ticks += 1000;
    ((u64 *)b)[0] = ticks / 1000000000, ((u64 *)b)[1] = ticks % 1000000000;
    return 0;
  case 158: /* arch_prctl: ARCH_SET_FS alone */
    if (a != 0x1002) return -22;
    set_register(0xC0000100, b);
    return 0;
  case 204: /* sched_getaffinity: one processor */
    *(u64 *)c = 1;
    return 8;
  case 318: /* getrandom: the same bytes in each run */
    for (u64 i = 0; i < b; i++) ((u8 *)a)[i] = 167 * i + 13;
    return b;
  case 202: /* futex: nobody to wake; whoever waits finds that the value has changed */
    return (b & 127) == 1 ? 0 : -11;
  case 7: case 10: case 13: case 14: case 24: case 28: case 131: /* poll, mprotect, signals, sched_yield, madvise */
    return 0;
  case 39: case 186: case 218: /* getpid, gettid, set_tid_address */
    return 1;
  case 2: case 21: case 89: case 257: case 262: case 267: /* files: ENOENT */
    return -2;
  case 56: /* clone: EAGAIN, upon which the test harness runs tests in its own thread */
    return -11;
  case 16: /* ioctl: ENOTTY */
    return -25;
  case 200: case 234: /* tkill, tgkill: abort() */
    put("\naborted\n");
    end();
  case 60: case 231: /* exit, exit_group */
    put("\nexit "), put_decimal(a), put("\n");
    end();
  }
  return -38; /* ENOSYS */
}

static void catch_all(void) {
  for (int i = 0; i < 32; i++) {
    u64 at = (u64)(faults + 16 * i);
    gates[2 * i] = (at & 0xFFFF) | 0x18ul << 16 | 0x8E00ul << 32 | (at >> 16 & 0xFFFF) << 48;
    gates[2 * i + 1] = at >> 32;
  }
  struct __attribute__((packed)) { unsigned short last; u64 at; } table = { sizeof gates - 1, (u64)gates };
  __asm__ volatile("lidt %0" ::"m"(table));
  set_register(0xC0000081, 0x18ul << 32);
  set_register(0xC0000082, (u64)on_syscall);
  set_register(0xC0000084, 0x700);
}

/* As execve does: the program's segments, and a stack with its arguments and what the C library asks of the kernel. */
void main(void) {
  catch_all();
  Elf64_Ehdr *header = (void *)PROGRAM;
  Elf64_Phdr *segment = (void *)(PROGRAM + header->e_phoff);
  u64 base = header->e_type == ET_DYN ? BASE : 0, end_of_program = 0, headers = 0;
  for (int i = 0; i < header->e_phnum; i++, segment++) {
    if (segment->p_type == PT_INTERP) put("the program is not static\n"), end();
    if (segment->p_type != PT_LOAD) continue;
    u64 at = base + segment->p_vaddr;
    copy(at, PROGRAM + segment->p_offset, segment->p_filesz);
    clear(at + segment->p_filesz, segment->p_memsz - segment->p_filesz);
    if (segment->p_offset <= header->e_phoff && header->e_phoff < segment->p_offset + segment->p_filesz)
      headers = at + header->e_phoff - segment->p_offset;
    if (at + segment->p_memsz > end_of_program) end_of_program = at + segment->p_memsz;
  }
  heap_start = heap_end = page_end(end_of_program);
  maps_end = MAPS;

  u64 *stack = (u64 *)(STACK - 0x10000), *top = stack, count = 1;
  stack[1] = (u64) "program";
  for (char *text = (char *)ARGUMENTS; *text && count < 60;) {
    stack[1 + count++] = (u64)text;
    while (*text != '\n') text++;
    *text++ = 0;
  }
  *stack = count;
  top += 1 + count;
  *top++ = 0, *top++ = 0; /* no more arguments; no environment */
  u64 facts[] = {
    AT_PHDR, headers, AT_PHENT, header->e_phentsize, AT_PHNUM, header->e_phnum, AT_PAGESZ, 4096,
    AT_ENTRY, base + header->e_entry, AT_SECURE, 0, AT_RANDOM, STACK - 64, AT_NULL, 0,
  };
  for (u64 i = 0; i < sizeof facts / 8; i++) *top++ = facts[i];
  enter(base + header->e_entry, (u64)stack);
}
