//! PCI functions, IOMMU groups, SR-IOV, resets and VFIO.
