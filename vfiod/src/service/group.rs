//! `org.vfiod1.Group`: one IOMMU group's properties.

use std::sync::Arc;

use libvfio::client::GroupRecord;

use crate::broker::Broker;

#[derive(Debug)]
pub(super) struct GroupObject {
    broker: Arc<Broker>,
    number: u32,
}

impl GroupObject {
    pub(super) fn new(broker: Arc<Broker>, number: u32) -> Self {
        Self { broker, number }
    }

    fn record(&self) -> GroupRecord {
        self.broker.group(self.number).unwrap_or_default()
    }
}

#[zbus::interface(name = "org.vfiod1.Group", introspection_docs = false)]
impl GroupObject {
    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> u32 {
        self.number
    }

    #[zbus(property)]
    pub(super) fn members(&self) -> Vec<String> {
        self.record().members
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn viable(&self) -> bool {
        self.record().viable
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn isolation(&self) -> String {
        self.record().isolation
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn sharing(&self) -> String {
        self.record().sharing
    }
}
