//! Who makes a call: by its key, else by the certificate of its connection, else by where that comes from. Found by
//! [`crate::authentication`] for every call of a server; handlers read it as they read a deadline.

use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use crate::who_leaves::Origin;

/// What calls are called that nobody with a key made: a label of metrics must not grow with every address.
const WITHOUT_KEY: &str = "";

/// A client, as an extension of its requests. Two calls of one client have equal ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client(Arc<Known>);

#[derive(Debug, PartialEq, Eq, Hash)]
enum Known {
    /// By its key: as the file of keys calls it.
    Key(Arc<str>),
    /// By its certificate: the first name of it.
    Certificate(Arc<str>),
    /// By the address of its connection.
    Address(IpAddr),
}

impl Client {
    /// The client of a request that came through the server stack.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().cloned()
    }

    /// The client whose key is called so.
    pub fn of_key(name: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Known::Key(name.into())))
    }

    /// Whoever is at the other end of a connection, as far as that is known.
    pub(crate) fn of_connection(end: &FarEnd) -> Option<Self> {
        let certificate = end.certificate_name.clone().map(Known::Certificate);
        certificate.or_else(|| end.address.map(Known::Address)).map(|known| Self(Arc::new(known)))
    }

    /// The name of its key, if it has one.
    pub(crate) fn key_name(&self) -> Option<&str> {
        match &*self.0 {
            Known::Key(name) => Some(name),
            Known::Certificate(_) | Known::Address(_) => None,
        }
    }

    /// Who it is where what clients use is counted: of IPv6 a whole network, of which one customer has all addresses.
    #[must_use]
    pub fn counted_as(&self) -> Self {
        match &*self.0 {
            Known::Address(address) => Self(Arc::new(Known::Address(Origin::from(*address).address()))),
            Known::Key(_) | Known::Certificate(_) => self.clone(),
        }
    }

    /// Whether it has a name, of a key or of a certificate, that tells it from all others.
    pub fn is_named(&self) -> bool {
        match &*self.0 {
            Known::Key(_) | Known::Certificate(_) => true,
            Known::Address(_) => false,
        }
    }

    /// The label of metrics: names of keys, which are few; the same for all others.
    pub fn label(&self) -> Arc<str> {
        match &*self.0 {
            Known::Key(name) => name.clone(),
            Known::Certificate(_) | Known::Address(_) => WITHOUT_KEY.into(),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Known::Key(name) | Known::Certificate(name) => f.write_str(name),
            Known::Address(address) => address.fmt(f),
        }
    }
}

/// The other end of a connection: an extension of every request on it.
#[derive(Clone, Debug, Default)]
pub struct FarEnd {
    /// Where it is.
    pub address: Option<IpAddr>,
    /// The first name in its certificate, where it had to show one.
    pub certificate_name: Option<Arc<str>>,
}

/// Where [`crate::outcome`] learns who made a call: it sees a request before its caller is known, and may see no response.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallerSlot(Arc<OnceLock<Client>>);

impl CallerSlot {
    pub(crate) fn fill(&self, client: &Client) {
        // A call has one caller, whichever layer asks first.
        let _ = self.0.set(client.clone());
    }

    pub(crate) fn client(&self) -> Option<&Client> {
        self.0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_no_name() {
        // Would break: all who come through one proxy are taken for a client that may see what it asked before, or who has a
        // certificate shares with strangers.
        let address = Some(IpAddr::from([127, 0, 0, 1]));
        let of = |certificate_name: Option<Arc<str>>| Client::of_connection(&FarEnd { address, certificate_name });
        assert!(!of(None).expect("an address").is_named());
        assert!(of(Some("ward".into())).expect("a certificate").is_named());
        assert!(Client::of_key("alice").is_named());
    }
}
