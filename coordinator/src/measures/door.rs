//! By which door a request came: callers of different doors want different things of the same model.

/// A door of a coordinator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// None: the request is of this process.
    #[default]
    Process,
    /// gRPC, of `sida.v1` and of the Open Inference Protocol.
    Grpc,
    /// HTTP as OpenAI's clients speak it.
    OpenAi,
    /// The Open Inference Protocol by HTTP.
    OpenInference,
}

impl Door {
    /// The doors of the network.
    pub(crate) const GRPC: &str = "grpc";
    pub(crate) const OPENAI: &str = "openai";
    pub(crate) const OPEN_INFERENCE: &str = "open_inference";

    /// What metrics call it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Grpc => Self::GRPC,
            Self::OpenAi => Self::OPENAI,
            Self::OpenInference => Self::OPEN_INFERENCE,
        }
    }
}

/// One of something for each door.
pub(crate) struct ByDoor<T>([T; 4]);

impl<T> ByDoor<T> {
    /// Made for each.
    pub(crate) fn new(make: impl FnMut(Door) -> T) -> Self {
        // In the order of the variants, by which they are found.
        Self([Door::Process, Door::Grpc, Door::OpenAi, Door::OpenInference].map(make))
    }

    /// That of a door.
    pub(crate) fn of(&self, door: Door) -> &T {
        &self.0[door as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_door_has_its_own() {
        // Would break: the times of one door are told as those of another.
        let labels = ByDoor::new(Door::label);
        for door in [Door::Process, Door::Grpc, Door::OpenAi, Door::OpenInference] {
            assert_eq!(*labels.of(door), door.label());
        }
    }
}
