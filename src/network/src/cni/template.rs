//! Fills a configuration template with the node's pod addresses. Understands the part of Go's template language
//! that such templates are written in: fields, variables, `range`, `if`, `else`, trimming.

use crate::subnet::Subnet;

/// Templates nest two or three deep.
const MAX_DEPTH: usize = 16;

/// Fills in `.PodCIDR`, `.PodCIDRRanges` and `.Routes`.
pub(crate) fn render(template: &str, subnets: &[Subnet]) -> Result<String, String> {
    let ranges: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
    let routes = subnets.iter().map(|s| if s.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.to_owned()).collect();
    let first = ranges.first().cloned().unwrap_or_default();
    let fields = Fields { first: Item::Text(first), ranges: Item::List(ranges), routes: Item::List(routes) };
    let tokens = tokens(template)?;
    let mut parser = Parser { tokens: &tokens, at: 0 };
    let nodes = parser.block(0)?;
    if parser.at < tokens.len() {
        return Err("end or else without a beginning".into());
    }
    let mut text = String::new();
    let mut variables = Vec::new();
    write(&nodes, &fields, &Item::Whole, &mut variables, &mut text)?;
    Ok(text)
}

#[derive(Clone)]
enum Item {
    Whole,
    Text(String),
    Number(usize),
    List(Vec<String>),
}

impl Item {
    fn holds(&self) -> bool {
        match self {
            Item::Whole => true,
            Item::Text(text) => !text.is_empty(),
            Item::Number(number) => *number != 0,
            Item::List(list) => !list.is_empty(),
        }
    }
}

struct Fields {
    first: Item,
    ranges: Item,
    routes: Item,
}

enum Token {
    Text(String),
    Action(String),
}

enum Node {
    Text(String),
    Value(String),
    If { test: String, yes: Vec<Node>, no: Vec<Node> },
    Range { names: Vec<String>, list: String, each: Vec<Node>, none: Vec<Node> },
}

fn tokens(template: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    while let Some((text, behind)) = rest.split_once("{{") {
        let (action, behind) = behind.split_once("}}").ok_or("an action without }}")?;
        let text = if trim { text.trim_start() } else { text };
        let (text, action) = match action.strip_prefix("- ") {
            Some(action) => (text.trim_end(), action),
            None => (text, action),
        };
        let (action, next) = match action.strip_suffix(" -") {
            Some(action) => (action, true),
            None => (action, false),
        };
        tokens.push(Token::Text(text.to_owned()));
        if !action.trim_start().starts_with("/*") {
            tokens.push(Token::Action(action.trim().to_owned()));
        }
        (rest, trim) = (behind, next);
    }
    tokens.push(Token::Text(if trim { rest.trim_start() } else { rest }.to_owned()));
    Ok(tokens)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    /// Reads up to the `end` or `else` that belongs to the caller.
    fn block(&mut self, depth: usize) -> Result<Vec<Node>, String> {
        if depth > MAX_DEPTH {
            return Err("nested too deep".into());
        }
        let mut nodes = Vec::new();
        while let Some(token) = self.tokens.get(self.at) {
            let action = match token {
                Token::Text(text) => {
                    nodes.push(Node::Text(text.clone()));
                    self.at += 1;
                    continue;
                }
                Token::Action(action) => action,
            };
            let (word, rest) = action.split_once(char::is_whitespace).unwrap_or((action, ""));
            match word {
                "end" | "else" => break,
                "if" => {
                    self.at += 1;
                    let (yes, no) = self.branches(depth)?;
                    nodes.push(Node::If { test: rest.trim().to_owned(), yes, no });
                }
                "range" => {
                    self.at += 1;
                    let (names, list) = match rest.split_once(":=") {
                        Some((names, list)) => {
                            (names.split(',').map(|n| n.trim().to_owned()).collect(), list)
                        }
                        None => (Vec::new(), rest),
                    };
                    let (each, none) = self.branches(depth)?;
                    nodes.push(Node::Range { names, list: list.trim().to_owned(), each, none });
                }
                _ => {
                    self.at += 1;
                    nodes.push(Node::Value(action.clone()));
                }
            }
        }
        Ok(nodes)
    }

    fn branches(&mut self, depth: usize) -> Result<(Vec<Node>, Vec<Node>), String> {
        let yes = self.block(depth + 1)?;
        let no = if self.take("else") { self.block(depth + 1)? } else { Vec::new() };
        if self.take("end") { Ok((yes, no)) } else { Err("a block without end".into()) }
    }

    fn take(&mut self, word: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some(Token::Action(action)) if action == word);
        self.at += usize::from(found);
        found
    }
}

type Variables = Vec<(String, Item)>;

fn write(
    nodes: &[Node],
    fields: &Fields,
    dot: &Item,
    variables: &mut Variables,
    text: &mut String,
) -> Result<(), String> {
    for node in nodes {
        match node {
            Node::Text(plain) => text.push_str(plain),
            Node::Value(name) => match value(name, fields, dot, variables)? {
                Item::Text(value) => text.push_str(&value),
                Item::Number(value) => text.push_str(&value.to_string()),
                _ => return Err(format!("{name} is not a text")),
            },
            Node::If { test, yes, no } => {
                let branch = if value(test, fields, dot, variables)?.holds() { yes } else { no };
                write(branch, fields, dot, variables, text)?;
            }
            Node::Range { names, list, each, none } => {
                let Item::List(items) = value(list, fields, dot, variables)? else {
                    return Err(format!("{list} is not a list"));
                };
                if items.is_empty() {
                    write(none, fields, dot, variables, text)?;
                }
                for (number, item) in items.into_iter().enumerate() {
                    let item = Item::Text(item);
                    let before = variables.len();
                    match names.as_slice() {
                        [] => {}
                        [only] => variables.push((only.clone(), item.clone())),
                        [index, only] => {
                            variables.push((index.clone(), Item::Number(number)));
                            variables.push((only.clone(), item.clone()));
                        }
                        _ => return Err("range with more than two variables".into()),
                    }
                    write(each, fields, &item, variables, text)?;
                    variables.truncate(before);
                }
            }
        }
    }
    Ok(())
}

fn value(name: &str, fields: &Fields, dot: &Item, variables: &Variables) -> Result<Item, String> {
    match name.strip_prefix('$').filter(|rest| rest.starts_with('.')).unwrap_or(name) {
        "." => Ok(dot.clone()),
        ".PodCIDR" => Ok(fields.first.clone()),
        ".PodCIDRRanges" => Ok(fields.ranges.clone()),
        ".Routes" => Ok(fields.routes.clone()),
        other => {
            let found = variables.iter().rev().find(|(name, _)| name == other);
            found.map(|(_, item)| item.clone()).ok_or_else(|| format!("{other:?} is not understood"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnets(text: &str) -> Vec<Subnet> {
        crate::subnet::list(text).unwrap()
    }

    #[test]
    fn the_usual_template_is_filled() {
        let template = r#"{"ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}], "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]}"#;
        assert_eq!(
            render(template, &subnets("10.0.0.0/24,fd00::/64")).unwrap(),
            r#"{"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}"#
        );
    }

    #[test]
    fn the_pieces_of_the_language_work() {
        for (template, text) in [
            ("{{.PodCIDR}}", "10.0.0.0/24"),
            ("a {{- .PodCIDR -}} b", "a10.0.0.0/24b"),
            ("{{range .Routes}}<{{.}}>{{end}}", "<0.0.0.0/0>"),
            ("{{range $r := .Routes}}{{$r}}{{$.PodCIDR}}{{end}}", "0.0.0.0/010.0.0.0/24"),
            ("{{if .PodCIDR}}y{{else}}n{{end}}", "y"),
            ("{{/* a remark */}}x", "x"),
            ("plain", "plain"),
        ] {
            assert_eq!(render(template, &subnets("10.0.0.0/24")).unwrap(), text, "{template}");
        }
        assert_eq!(
            render("{{if .PodCIDR}}y{{else}}n{{end}}{{range .Routes}}r{{else}}none{{end}}", &[]).unwrap(),
            "nnone"
        );
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for template in [
            "{{",
            "{{if .PodCIDR}}",
            "{{end}}",
            "{{else}}",
            "{{.Nope}}",
            "{{$x}}",
            "{{range .PodCIDR}}{{end}}",
            "{{.Routes}}",
            "{{printf .PodCIDR}}",
        ] {
            assert!(render(template, &subnets("10.0.0.0/24")).is_err(), "{template}");
        }
    }

    proptest! {
        #[test]
        fn no_template_can_panic_us(template in r#"(\{\{|\}\}|range|if|else|end|\$i|:=|,|\.PodCIDR|\.Routes| |-|x){0,40}"#) {
            let _ = render(&template, &subnets("10.0.0.0/24"));
        }
    }
}
