#!/bin/bash
# Takes the policy's rules into the initramfs, for drivers that live there: a module of dracut. Made
# by vfiod from the policy; without any there is nothing to take.

# What is taken for a kernel, so that vfiod can tell when the policy is another one. It counts once the
# initramfs is newer than this.
taken=$dracutsysrootdir/var/lib/vfiod/initramfs/$kernel

check() {
    [[ -s $dracutsysrootdir/etc/udev/rules.d/10-vfiod.rules ]] && return 0
    [[ ! -e $taken ]] || : > "$taken"
    return 1
}

depends() {
    return 0
}

installkernel() {
    hostonly='' instmods vfio_pci vfio_iommu_type1
}

install() {
    inst_simple /etc/udev/rules.d/10-vfiod.rules
    inst_binary /usr/libexec/vfiod-early
    local file
    for file in /etc/vfiod/vfiod.toml /etc/vfiod/vfiod.toml.d/*.toml /var/lib/vfiod/policy-met.json; do
        [[ -e $dracutsysrootdir$file ]] && inst_simple "$file"
    done
    # Before udev starts, and with it the first module: one that loads for a device takes all it knows.
    inst_hook pre-udev 10 "$moddir/vfiod-early.sh"

    mkdir -p "${taken%/*}"
    (
        export LC_ALL=C
        cd "$dracutsysrootdir/" || exit
        cat etc/udev/rules.d/10-vfiod.rules etc/vfiod/vfiod.toml etc/vfiod/vfiod.toml.d/*.toml \
            var/lib/vfiod/policy-met.json
    ) > "$taken" 2> /dev/null
    return 0
}
