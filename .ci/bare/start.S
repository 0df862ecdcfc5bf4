# The first instructions after reset, in a ROM of 64 KiB that ends at 1 MiB and at 4 GiB: from real mode to long mode with
# all of the processor's vector registers enabled, then main() of program.c. What is not here: interrupts, other processors.
    .section .text.start,"ax"
rom:
    .code16
    cli
    lgdtl %cs:(descriptors_at-rom)
    mov %cr0,%eax
    or $1,%al
    mov %eax,%cr0
    ljmpl $8,$protected
    .code32
protected:
    mov $0x10,%eax
    mov %eax,%ds
    mov %eax,%es
    mov %eax,%ss
    # Page tables from 0x1000 on: 4 GiB, each address its own, in pages of 2 MiB.
    cld
    mov $0x1000,%edi
    xor %eax,%eax
    mov $0x1800,%ecx
    rep stosl
    movl $0x2003,0x1000
    movl $0x3003,0x2000
    movl $0x4003,0x2008
    movl $0x5003,0x2010
    movl $0x6003,0x2018
    mov $0x83,%eax
    mov $0x3000,%edi
1:  mov %eax,(%edi)
    add $0x200000,%eax
    add $8,%edi
    cmp $0x7000,%edi
    jne 1b
    mov $0x1000,%eax
    mov %eax,%cr3
    mov $0x40620,%eax           # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    mov %eax,%cr4
    mov $0xC0000080,%ecx
    rdmsr
    or $0x101,%eax              # long mode, SYSCALL
    wrmsr
    mov $0x80000033,%eax        # PG, NE, ET, MP, PE
    mov %eax,%cr0
    ljmpl $0x18,$long
    .code64
long:
    mov $0xD,%eax               # x87, SSE, AVX and AVX-512, as far as they are there
    xor %ecx,%ecx
    cpuid
    and $0xE7,%eax
    xor %ecx,%ecx
    xor %edx,%edx
    xsetbv
    mov $0x80000,%esp
    jmp main
    .balign 8
descriptors:
    .quad 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF, 0x00AF9A000000FFFF
descriptors_at:
    .word descriptors_at - descriptors - 1
    .long descriptors

    .text
    # The program runs in ring 0 and may have data below its stack pointer: calls get a stack of their own.
    .globl on_syscall
on_syscall:
    mov %rsp,program_stack
    mov $0x90000,%esp
    push %rcx
    push %r11
    push %rdi
    push %rsi
    push %rdx
    push %r8
    push %r9
    push %r10
    mov %r8,%r9
    mov %r10,%r8
    mov %rdx,%rcx
    mov %rsi,%rdx
    mov %rdi,%rsi
    mov %rax,%rdi
    call linux_call
    pop %r10
    pop %r9
    pop %r8
    pop %rdx
    pop %rsi
    pop %rdi
    pop %r11
    pop %rcx
    mov program_stack,%rsp
    lea -128(%rsp),%rsp
    push %r11
    popfq
    lea 128(%rsp),%rsp
    jmp *%rcx

    .globl enter                # rdi: where; rsi: its stack
enter:
    mov %rsi,%rsp
    xor %edx,%edx
    jmp *%rdi

    # One entry of 16 bytes for each exception: its number, after an error code or in place of one.
    .balign 16
    .globl faults
faults:
    .set number,0
    .rept 32
    .balign 16
    .if !(number == 8 || (number >= 10 && number <= 14) || number == 17 || number == 21 || number == 29 || number == 30)
    pushq $0
    .endif
    pushq $number
    jmp any_fault
    .set number,number+1
    .endr
any_fault:
    mov %rsp,%rdi
    mov $0x98000,%esp
    call on_fault

    .section .reset,"ax"
    .code16
    ljmp $0xF000,$0
    .balign 16

    .section .note.GNU-stack,"",@progbits
