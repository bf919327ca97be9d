/* floor.c: the least a virtual machine can cost here, for the ratios of `just bench`.
 *
 *   floor MIB COUNT-FILE-OR-'-'
 *
 * Makes only the KVM calls: a VM, one slot of memory, the split interrupt controller, a vCPU in 64-bit mode; runs
 * `mov $0x41,%al; out %al,$0xe9; (hlt | mov %al,0xf4 …)`: prints the byte and leaves, or with `halt` stays. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void check(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	size_t size = (argc > 1 ? strtoul(argv[1], 0, 0) : 128) << 20;
	int halt = argc > 2 && !strcmp(argv[2], "halt");
	static const uint8_t code[] = {
		0xb0, 0x41, 0xe6, 0xe9, /* mov $'A',%al; out %al,$0xe9 */
		0xe6, 0xf4,             /* out %al,$0xf4: the end */
		0xf4, 0xeb, 0xfd,       /* hlt; jmp back */
	};
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	check(kvm, "/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm, "KVM_CREATE_VM");
	uint8_t *ram = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	check(ram == MAP_FAILED ? -1 : 0, "mmap");
	struct kvm_userspace_memory_region slot = { .memory_size = size, .userspace_addr = (uintptr_t)ram };
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	check(ioctl(vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");
	int cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(cpu, "KVM_CREATE_VCPU");
	int mapped = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	check(mapped, "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	check(run == MAP_FAILED ? -1 : 0, "mmap vcpu");

	/* identity page tables: 1 GiB in 2 MiB pages */
	uint64_t *pml4 = (uint64_t *)(ram + 0x1000), *pdpt = (uint64_t *)(ram + 0x2000), *pd = (uint64_t *)(ram + 0x3000);
	pml4[0] = 0x2003;
	pdpt[0] = 0x3003;
	for (int i = 0; i < 512; i++)
		pd[i] = (uint64_t)i << 21 | 0x83;
	memcpy(ram + 0x10000, code, sizeof code);
	if (halt)
		memset(ram + 0x10004, 0x90, 2);

	struct kvm_sregs s;
	check(ioctl(cpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
	s.cr3 = 0x1000;
	s.cr4 = 0x20;
	s.cr0 = 0x80000033;
	s.efer = 0x500;
	struct kvm_segment cs = { .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment ds = { .limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	s.cs = cs;
	s.ds = s.es = s.fs = s.gs = s.ss = ds;
	check(ioctl(cpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
	struct kvm_regs r = { .rip = 0x10000, .rsp = 0x20000, .rflags = 2 };
	check(ioctl(cpu, KVM_SET_REGS, &r), "KVM_SET_REGS");

	for (;;) {
		check(ioctl(cpu, KVM_RUN, 0), "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT) {
			fprintf(stderr, "floor: exit %u\n", run->exit_reason);
			return 1;
		}
		if (run->io.port == 0xe9)
			check(write(1, (uint8_t *)run + run->io.data_offset, 1), "write");
		else
			break;
	}
	/* A process that ends with its VM open may wait for two grace periods of the kernel's, not one. */
	munmap(run, mapped);
	close(cpu);
	close(vm);
	return 0;
}
