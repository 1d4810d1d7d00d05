//! Stand-in.
use crate::command::Key;
use crate::schema::KeyTemplate;
use bytes::Bytes;

pub fn from_segments(template: &KeyTemplate, segments: &[Bytes]) -> Key {
    let mut key = template.literal.clone().into_bytes();
    for (i, segment) in segments.iter().enumerate() {
        if i > 0 {
            key.push(b':');
        }
        for &b in segment {
            match b {
                b'%' if segments.len() > 1 => key.extend(b"%25"),
                b':' if segments.len() > 1 => key.extend(b"%3A"),
                _ => key.push(b),
            }
        }
    }
    Key(key.into())
}

pub fn decode(template: &KeyTemplate, key: &Key) -> Option<Vec<Bytes>> {
    let rest = key.as_bytes().strip_prefix(template.literal.as_bytes())?;
    if template.columns.len() == 1 {
        return (!rest.is_empty()).then(|| vec![Bytes::copy_from_slice(rest)]);
    }
    let parts: Vec<Bytes> = rest.split(|&b| b == b':').map(Bytes::copy_from_slice).collect();
    (parts.len() == template.columns.len()).then_some(parts)
}
