//! A socket of the daemon's own, over which root asks it without the bus: nothing goes through a third
//! process. It has the Manager and the leases made over it, and the calls are the same.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use libvfio::client::ROOT_PATH;
use tokio::net::{UnixListener, UnixStream};
use tracing::warn;
use zbus::Guid;
use zbus::connection::Builder;

use super::Caller;
use super::manager::ManagerObject;

/// How long one waits after a connection that could not be taken, as where descriptors have run out.
const AGAIN: Duration = Duration::from_secs(1);

/// Makes the socket, in place of what a daemon before has left.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Takes connections until the daemon ends.
pub(super) async fn serve(listener: UnixListener, caller: Caller) {
    let guid = Guid::generate();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (caller, guid) = (caller.clone(), guid.clone());
                tokio::spawn(async move {
                    if let Err(error) = talk(stream, caller, guid).await {
                        warn!(%error, "somebody could not ask over the daemon's own socket");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "a connection to the daemon's own socket could not be taken");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Answers one connection until it is closed. Whom root may be is the kernel's word.
async fn talk(stream: UnixStream, caller: Caller, guid: Guid<'static>) -> zbus::Result<()> {
    let user = stream.peer_cred()?.uid();
    if !caller.authority.trusts(user) {
        warn!(user, "refused at the daemon's own socket, which is for root");
        return Ok(());
    }
    let caller = Caller { authority: Arc::new(caller.authority.for_peer(user)), ..caller };
    let manager = ManagerObject::new(caller);
    let builder = Builder::unix_stream(stream.into_std()?).server(guid).p2p();
    let connection = builder.serve_at(ROOT_PATH, manager).build().await?;
    connection.closed().await;
    Ok(())
}
