#!/bin/bash
# Takes the policy's rules into the initramfs, for drivers that live there: a module of dracut. Made
# by vfiod from the policy; without any there is nothing to take.

check() {
    [[ -s $dracutsysrootdir/etc/udev/rules.d/10-vfiod.rules ]] || return 1
    return 0
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
    return 0
}
