//! The login of the replication session: which message may come when, and how to answer it.
//!
//! Pure: it takes messages and returns what to send. A server that has not been authenticated may send anything, so
//! every state lists the messages that it accepts, as libpq does; any other ends the login. A mistake here accepts a
//! server that does not know the password, or sends it the password.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>
//! <https://www.postgresql.org/docs/current/sasl-authentication.html>

use super::connect::{NO_PASSWORD, UNBOUND, login_refused, refused_by_us};
use super::target::ChannelBinding;
use super::wire::{garbage, name, notice, unsendable};
use super::{ServerError, SourceError};
use crate::code::Code;
use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use std::io;

/// Who logs in, and to which channel the login may be bound.
pub struct Credentials {
    pub user: String,
    pub password: Option<String>,
    pub channel_binding: ChannelBinding,
    /// A hash of the server's certificate; `None` without TLS.
    pub end_point: Option<Vec<u8>>,
}

/// A login in progress: the startup message has been sent.
pub struct Login {
    /// The server's name, for messages.
    at: String,
    credentials: Credentials,
    state: State,
    backend_pid: i32,
}

/// What has happened, and therefore what may come next. An ErrorResponse may always come.
enum State {
    /// The server knows our name. It asks for authentication, or admits us.
    Introduced,
    /// A password was sent. Only AuthenticationOk may follow.
    Answered,
    /// SCRAM has begun. The server's challenge must follow.
    Begun(ScramSha256),
    /// Our proof was sent. The server's signature must follow, which proves that it knows the password, too.
    Proven(ScramSha256),
    /// Authenticated. The session's parameters follow, until it is ready for a query.
    Admitted,
    /// Logged in, or rejected.
    Over,
}

/// What to do after a message.
pub enum Step {
    Send(BytesMut),
    Wait,
    /// `backend_pid` is 0 if the server did not send it.
    LoggedIn {
        backend_pid: i32,
    },
}

impl Login {
    pub fn new(at: String, credentials: Credentials) -> Self {
        Login { at, credentials, state: State::Introduced, backend_pid: 0 }
    }

    /// Takes the server's next message.
    ///
    /// # Errors
    /// If the server rejects the login, if the login rejects the server, or if the message is not allowed here. The
    /// connection can no longer be used then.
    pub fn take(&mut self, message: Message) -> Result<Step, SourceError> {
        use Message as M;
        let mut out = BytesMut::new();
        self.state = match (std::mem::replace(&mut self.state, State::Over), message) {
            (_, M::ErrorResponse(body)) => {
                let error = ServerError::parse(body.fields()).map_err(|e| self.garbage(e))?;
                return Err(login_refused(&self.at, error));
            }
            (State::Introduced, M::AuthenticationOk) => {
                self.unbound()?;
                State::Admitted
            }
            (State::Introduced, M::AuthenticationCleartextPassword) => {
                self.unbound()?;
                frontend::password_message(self.password()?, &mut out).map_err(|e| unsendable(self.doing(), e))?;
                State::Answered
            }
            (State::Introduced, M::AuthenticationMd5Password(body)) => {
                self.unbound()?;
                let hash = md5_hash(self.credentials.user.as_bytes(), self.password()?, body.salt());
                frontend::password_message(hash.as_bytes(), &mut out).map_err(|e| self.garbage(e))?;
                State::Answered
            }
            (State::Introduced, M::AuthenticationSasl(body)) => State::Begun(self.begin(&body, &mut out)?),
            (State::Begun(mut exchange), M::AuthenticationSaslContinue(body)) => {
                exchange.update(body.data()).map_err(|e| self.garbage(e))?;
                frontend::sasl_response(exchange.message(), &mut out).map_err(|e| self.garbage(e))?;
                State::Proven(exchange)
            }
            (State::Proven(mut exchange), M::AuthenticationSaslFinal(body)) => {
                exchange.finish(body.data()).map_err(|e| self.garbage(e))?;
                State::Answered
            }
            (State::Answered, M::AuthenticationOk) => State::Admitted,
            (State::Admitted, M::ParameterStatus(_)) => State::Admitted,
            (State::Admitted, M::NoticeResponse(body)) => {
                notice(ServerError::parse(body.fields()));
                State::Admitted
            }
            (State::Admitted, M::BackendKeyData(body)) => {
                self.backend_pid = body.process_id();
                State::Admitted
            }
            (State::Admitted, M::ReadyForQuery(_)) => return Ok(Step::LoggedIn { backend_pid: self.backend_pid }),
            (
                State::Introduced,
                M::AuthenticationKerberosV5
                | M::AuthenticationGss
                | M::AuthenticationSspi
                | M::AuthenticationScmCredential,
            ) => {
                let fact = "wants Kerberos, GSSAPI or SSPI, which are not supported".to_owned();
                return Err(self.refused(fact, "use scram-sha-256 in pg_hba.conf for this role"));
            }
            (_, other) => return Err(SourceError::unexpected(self.doing(), name(&other))),
        };
        Ok(if out.is_empty() { Step::Wait } else { Step::Send(out) })
    }

    /// Makes the same decisions as tokio-postgres does for ordinary connections.
    fn begin(&self, body: &AuthenticationSaslBody, out: &mut BytesMut) -> Result<ScramSha256, SourceError> {
        let offers = offers(body).map_err(|e| self.garbage(e))?;
        let Credentials { end_point, channel_binding, .. } = &self.credentials;
        let end_point = end_point.clone().filter(|_| *channel_binding != ChannelBinding::Disable);
        let (binding, mechanism) = match (offers, end_point) {
            (Offers { plus: true, .. }, Some(hash)) => {
                (sasl::ChannelBinding::tls_server_end_point(hash), SCRAM_SHA_256_PLUS)
            }
            // Announces that we support binding: a server that offered it then knows that somebody removed the offer.
            (Offers { plus: false, plain: true }, Some(_)) => (sasl::ChannelBinding::unrequested(), SCRAM_SHA_256),
            (Offers { plain: true, .. }, None) => (sasl::ChannelBinding::unsupported(), SCRAM_SHA_256),
            (Offers { plain: false, .. }, _) => {
                let fact = "offers no SASL mechanism known here".to_owned();
                return Err(self.refused(fact, "use scram-sha-256 in pg_hba.conf"));
            }
        };
        if mechanism == SCRAM_SHA_256 {
            self.unbound()?;
        }
        let exchange = ScramSha256::new(self.password()?, binding);
        frontend::sasl_initial_response(mechanism, exchange.message(), out).map_err(|e| self.garbage(e))?;
        Ok(exchange)
    }

    /// Continues the login without binding it to the TLS connection, which a man in the middle could exploit.
    fn unbound(&self) -> Result<(), SourceError> {
        match self.credentials.channel_binding {
            ChannelBinding::Require => Err(refused_by_us(&self.at, UNBOUND)),
            _ => Ok(()),
        }
    }

    fn password(&self) -> Result<&[u8], SourceError> {
        let password = self.credentials.password.as_deref();
        password.map(str::as_bytes).ok_or_else(|| refused_by_us(&self.at, NO_PASSWORD))
    }

    fn doing(&self) -> String {
        format!("logging in to {}", self.at)
    }

    fn garbage(&self, error: io::Error) -> SourceError {
        garbage(self.doing(), error)
    }

    fn refused(&self, fact: String, remedy: &'static str) -> SourceError {
        SourceError::Login { code: Code::PostgresLogin, at: self.at.clone(), fact, remedy }
    }
}

/// Which variants of SCRAM-SHA-256 a server offers: with channel binding, and without.
#[derive(Debug, Clone, Copy, Default)]
struct Offers {
    plus: bool,
    plain: bool,
}

fn offers(body: &AuthenticationSaslBody) -> io::Result<Offers> {
    let mut offers = Offers::default();
    let mut mechanisms = body.mechanisms();
    while let Some(mechanism) = mechanisms.next()? {
        offers.plus |= mechanism == SCRAM_SHA_256_PLUS;
        offers.plain |= mechanism == SCRAM_SHA_256;
    }
    Ok(offers)
}
